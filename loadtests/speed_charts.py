"""Pictures of speed: requests per second, goodput, latencies, and throughput against latency."""

from collections.abc import Callable

from matplotlib.figure import Figure

from loadtests.chart_frame import legend, line_with_range, panels, plain_ticks, setting_style
from loadtests.figures import Group
from loadtests.results import Results, settings_of


def _against_budget(results: Results, values: Callable[[Group], list[float]], label: str) -> Figure | None:
    if not results.phases:
        return None
    figure, axes = panels(results, results.phases)
    settings = settings_of(results)
    for axis, phase in zip(axes, results.phases, strict=True):
        loads = results.loads(phase)
        for i, load in enumerate(loads):
            points = [(x, values(g)) for x, s in enumerate(settings) if (g := results.group(phase, s, load))]
            line_with_range(axis, points, i, len(loads), results.load_label(load))
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlabel("retain budget (visual tokens left of each image)")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(label)
    legend(figure, axes[0], "load")
    return figure


def requests_per_second(results: Results) -> Figure | None:
    """Requests per second against the budget, a line for each load."""
    return _against_budget(results, lambda group: group.rates, "requests/s")


def goodput(results: Results) -> Figure | None:
    """Goodput against the budget."""
    return _against_budget(results, lambda group: group.goodputs(results.slo), f"requests/s with {results.slo}")


def _against_load(results: Results, value: Callable[[Group, float], float | None], label: str) -> Figure | None:
    if not results.phases:
        return None
    figure, axes = panels(results, results.phases)
    for axis, phase in zip(axes, results.phases, strict=True):
        for setting in settings_of(results):
            found = [g for load in results.loads(phase) if (g := results.group(phase, setting, load))]
            for share, line in ((50, "-"), (99, "--")):
                points = [(g.load, y) for g in found if (y := value(g, share)) is not None]
                axis.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    line,
                    alpha=1.0 if share == 50 else 0.55,
                    label=setting if share == 50 else None,
                    **setting_style(results, setting),
                )
        axis.set_xlabel("arrivals per second" if results.open_loop else "requests at once (users)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(results.loads(phase), [f"{load:g}" for load in results.loads(phase)])
        axis.minorticks_off()
        axis.set_yscale("log")
        plain_ticks(axis.yaxis)
    axes[0].set_ylabel(label)
    legend(figure, axes[0], "budget")
    return figure


def ttft(results: Results) -> Figure | None:
    """Time to first token against the load."""
    return _against_load(results, lambda group, share: group.ttft(share), "time to first token (s)")


def tpot(results: Results) -> Figure | None:
    """Time per output token against the load."""

    def milliseconds(group: Group, share: float) -> float | None:
        value = group.tpot(share)
        return None if value is None else value * 1000

    return _against_load(results, milliseconds, "time per output token (ms)")


def pareto(results: Results) -> Figure | None:
    """Requests per second against the median time of a whole answer."""
    if not results.phases:
        return None
    figure, axes = panels(results, results.phases)
    for axis, phase in zip(axes, results.phases, strict=True):
        for setting in settings_of(results):
            found = [g for load in results.loads(phase) if (g := results.group(phase, setting, load))]
            points = [(g, y) for g in found if (y := g.e2e(50)) is not None]
            xs, ys = [y for _, y in points], [g.rate for g, _ in points]
            axis.plot(xs, ys, "-", label=setting, **setting_style(results, setting))
            for g, x in points:
                text = f"{g.load:g}"
                axis.annotate(text, (x, g.rate), textcoords="offset points", xytext=(4, 4), fontsize=7, color="#555555")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_xlabel("median time of a whole answer (s)")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("requests/s")
    legend(figure, axes[0], "budget")
    return figure
