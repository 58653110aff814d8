"""How the report's pictures look: panels, colours, marks, and lines with the repeats' range."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtests.grid import STOCK
from loadtests.results import Results, phase_title, settings_of

GREY, PLAN = "#6b6b6b", "#c9c9c9"
MARKERS = "osD^vP"
# matplotlib lists every key that it knows as a literal; ours are written out here.
STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def marker(number: int) -> str:
    """The mark of the ``number``-th series."""
    return MARKERS[number % len(MARKERS)]


def setting_colours(results: Results) -> dict[str, Any]:
    """Stock is grey; the smaller the budget, the darker its colour."""
    shades, n = plt.get_cmap("viridis_r"), len(results.budgets)
    return {STOCK: GREY} | {b: shades(0.2 + 0.75 * i / max(1, n - 1)) for i, b in enumerate(results.budgets)}


def load_colour(number: int, loads: int) -> Any:
    """The heavier the load, the darker its colour."""
    return plt.get_cmap("cividis_r")(0.25 + 0.7 * number / max(1, loads - 1))


def panels(results: Results, phases: Sequence[str], width: float = 4.6) -> tuple[Figure, list[Axes]]:
    """A panel for each phase, side by side, with a common vertical scale."""
    figure, axes = plt.subplots(
        1, len(phases), figsize=(width * len(phases), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, phase in zip(axes[0], phases, strict=True):
        pool = results.pool_bytes(phase)
        size = f" ({pool / 2**20:.0f} MiB)" if pool else ""
        axis.set_title(phase_title(phase) + size, fontsize=10)
    return figure, list(axes[0])


def plain_ticks(axis: Axis) -> None:
    """Writes out the ticks of a logarithmic scale: 0.5, 2, 10."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def setting_style(results: Results, setting: str) -> dict[str, Any]:
    """Colour, mark and width of a setting's line; stock is a broad line underneath, for 576 may run on top of it."""
    number = settings_of(results).index(setting)
    broad: dict[str, Any] = {"linewidth": 4, "markersize": 8, "zorder": 1} if setting == STOCK else {"markersize": 5}
    return {"color": setting_colours(results)[setting], "marker": marker(number)} | broad


def legend(figure: Figure, axis: Axes, title: str) -> None:
    """One legend for all panels, beside them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside right upper")


def line_with_range(
    axis: Axes, points: Sequence[tuple[float, Sequence[float]]], number: int, lines: int, label: str
) -> None:
    """A line through the means of the repeats' values at each place, with bars from their lowest to their highest."""
    middle = [sum(values) / len(values) for _, values in points]
    axis.errorbar(
        [x for x, _ in points],
        middle,
        yerr=[
            [m - min(values) for m, (_, values) in zip(middle, points, strict=True)],
            [max(values) - m for m, (_, values) in zip(middle, points, strict=True)],
        ],
        marker=marker(number),
        capsize=3,
        color=load_colour(number, lines),
        label=label,
    )
