"""What estimators say of each layer's discard, beside differences of the hard loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eos_search.ablations.gradients import STUDY
from eos_search.ablations.verdicts import BRUTE
from eos_search.plots.canvas import panels
from eos_vllm.core.errors import EosError


def gradients_figure(result: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]]:
    """A panel for each point and rule of counts: bars by layer, with two standard errors to each side.

    Returns:
        The figure, and its data.

    Raises:
        EosError: a result of another study, or without a question.
    """
    if result.get("study") != STUDY or not result.get("summary"):
        problem = "is no result of this study" if result.get("study") != STUDY else "holds no question"
        raise EosError("--raw", str(result.get("study")), problem, "give a file of `eos-search ablate gradients --out`")
    summary = result["summary"]
    figure, axes = panels(-(-len(summary) // 2), min(2, len(summary)), width=4.8)
    for axis, (name, entry) in zip(axes, summary.items(), strict=False):
        estimates = entry["estimates"]
        places, width = np.arange(len(entry["layers"])), 0.8 / len(estimates)
        for number, (who, estimate) in enumerate(estimates.items()):
            label = "hard loss, differences" if who == BRUTE else who
            colour = "black" if who == BRUTE else f"C{number - 1}"
            errors = 2 * np.array(estimate["se"])
            bars = axis.bar(places + number * width, estimate["mean"], width, yerr=errors, color=colour, ecolor="grey")
            bars.set_label(label)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xticks(places + width * (len(estimates) - 1) / 2, [f"layer {layer}" for layer in entry["layers"]])
        axis.set(title=name, ylabel="gradient of the loss to the discard")
    for axis in axes[len(summary) :]:
        axis.axis("off")
    axes[0].legend(fontsize=7)
    return figure, {"figure": STUDY, "questions": len(result["rows"]), "summary": summary, "default": result["default"]}
