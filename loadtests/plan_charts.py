"""Pictures that hold figures against the plan: KV memory, requests that fit, share of the ceiling; and accuracy."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from loadtests.chart_frame import GREY, PLAN, legend, line_with_range, marker, panels, setting_colours
from loadtests.figures import ratios
from loadtests.grid import STOCK
from loadtests.measures import wilson
from loadtests.results import Results, settings_of
from loadtests.sweep_options import ACCURACY


def _pairs(
    results: Results,
    phases: Sequence[str],
    planned: Callable[[str, str], float | None],
    measured: Callable[[str, str], float | None],
    label: str,
) -> Figure | None:
    """Two bars for each setting: the plan's and the server's."""
    settings = settings_of(results)
    kept = [p for p in phases if any(measured(p, s) is not None and planned(p, s) is not None for s in settings)]
    if not kept:
        return None
    figure, axes = panels(results, kept)
    shades = setting_colours(results)
    for axis, phase in zip(axes, kept, strict=True):
        for x, setting in enumerate(settings):
            plan, seen = planned(phase, setting), measured(phase, setting)
            for offset, value, colour in ((-0.2, plan, PLAN), (0.2, seen, shades[setting])):
                if value is not None:
                    axis.bar(x + offset, value, 0.38, color=colour)
                    axis.annotate(f"{value:.3g}", (x + offset, value), ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlabel("retain budget (light: plan, coloured: measured)")
        axis.grid(visible=False, axis="x")
    axes[0].set_ylabel(label)
    return figure


def kv_per_request(results: Results) -> Figure | None:
    """KV memory of a running request, planned and measured, at the highest load."""

    def planned(phase: str, setting: str) -> float | None:
        promised = results.promise(phase, setting)
        return None if promised is None else promised.kv_bytes / 2**20

    def measured(phase: str, setting: str) -> float | None:
        promised = results.promise(phase, setting)
        group = results.group(phase, setting, results.loads(phase)[-1])
        if promised is None or group is None:
            return None
        value = group.kv_per_request(promised.block_bytes)
        return None if value is None else value / 2**20

    return _pairs(results, results.phases, planned, measured, "KV memory per request (MiB)")


def concurrency(results: Results) -> Figure | None:
    """Requests running at once where KV memory is what binds."""

    def planned(phase: str, setting: str) -> float | None:
        promised, pool = results.promise(phase, setting), results.pool_bytes(phase)
        if promised is None or pool is None:
            return None
        return min(promised.fits(pool), results.loads(phase)[-1])

    def measured(phase: str, setting: str) -> float | None:
        group = results.group(phase, setting, results.loads(phase)[-1])
        return None if group is None else group.most_running

    if results.open_loop:
        return None
    return _pairs(results, [p for p in results.phases if p == "bound"], planned, measured, "requests running at once")


def ceiling(results: Results) -> Figure | None:
    """Speed-up over the plan's ceiling, a line for each load."""
    kept = [p for p in results.phases if all(results.promise(p, b) for b in results.budgets)]
    if not kept or results.open_loop:
        return None
    figure, axes = panels(results, kept)
    for axis, phase in zip(axes, kept, strict=True):
        loads = results.loads(phase)
        for i, load in enumerate(loads):
            stock = results.group(phase, STOCK, load)
            points = []
            for x, budget in enumerate(results.budgets):
                group, promised = results.group(phase, budget, load), results.promise(phase, budget)
                if group and stock and promised and (values := ratios(group, stock)):
                    points.append((x, [100 * value / promised.by_tokens for value in values]))
            line_with_range(axis, points, i, len(loads), results.load_label(load))
        axis.axhline(100, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(results.budgets)), results.budgets)
        axis.set_xlabel("retain budget (visual tokens left of each image)")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("share of the ceiling (%)")
    legend(figure, axes[0], "load")
    return figure


def accuracy(results: Results) -> Figure | None:
    """Accuracy against throughput, for whatever phase has answers that can be marked."""
    marked = [g for g in results.groups if g.marks[1]]
    if not marked:
        return None
    phase = ACCURACY if any(g.phase == ACCURACY for g in marked) else marked[0].phase
    load = results.loads(phase)[-1]
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    shades = setting_colours(results)
    for i, setting in enumerate(settings_of(results)):
        group = results.group(phase, setting, load)
        if group is None or not group.marks[1]:
            continue
        right, total = group.marks
        share, (low, high) = right / total, wilson(right, total)
        axis.errorbar(
            [group.rate],
            [100 * share],
            xerr=[[group.rate - min(group.rates)], [max(group.rates) - group.rate]],
            yerr=[[100 * (share - low)], [100 * (high - share)]],
            marker=marker(i),
            capsize=3,
            linestyle="none",
            color=shades[setting],
            label=setting,
        )
    axis.set_xlabel(f"requests/s ({results.load_label(load)})")
    axis.set_ylabel("answers right (%)")
    axis.set_xlim(left=0)
    legend(figure, axis, "budget")
    return figure
