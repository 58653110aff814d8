"""The report's figure: requests per second over stock's, a panel for each scenario."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from loadtests.results import Results

_COLUMNS = 3
_MARKERS = "osD^vP"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(results: Results, file: Path) -> None:
    """Writes a PNG: budgets across, a line for each load, bars for 95 % intervals; the line at 1 is stock."""
    names, budgets, loads = results.scenarios, results.budgets, results.loads
    columns = min(_COLUMNS, len(names))
    shades = plt.get_cmap("viridis_r")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(-(-len(names) // columns), columns),
            figsize=(3.2 * columns, 2.6 * -(-len(names) // columns) + 0.6),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        for axis, scenario in zip(axes.flat, names, strict=False):
            axis.set_title(scenario.replace("_", " "), fontsize=10)
            axis.axhline(1, color="#6b6b6b", linewidth=1)
            for number, load in enumerate(loads):
                # Side by side, so that no interval hides another.
                shift = 0.12 * (number - (len(loads) - 1) / 2)
                found = [(x + shift, results.ratio(scenario, load, b)) for x, b in enumerate(budgets)]
                points = [(x, ratio) for x, ratio in found if ratio is not None]
                axis.errorbar(
                    [x for x, _ in points],
                    [r.mean for _, r in points],
                    yerr=[
                        [r.mean - (r.low or r.mean) for _, r in points],
                        [(r.high or r.mean) - r.mean for _, r in points],
                    ],
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4,
                    linewidth=1,
                    capsize=2,
                    color=shades(0.25 + 0.7 * number / max(1, len(loads) - 1)),
                    label=load.label,
                )
            axis.set_xticks(range(len(budgets)), budgets)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        figure.supxlabel("retain budget", fontsize=9)
        figure.supylabel("requests/s over stock's", fontsize=9)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(loads))
        figure.suptitle(results.subject, fontsize=9, x=0.02, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
