"""Accuracy against cost of searches and their opponents, with intervals over questions and seeds."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from eos_search.answerers import STOCK
from eos_search.comparison.summary import by_method
from eos_search.plots.canvas import Line, draw, panels


def comparison_figure(result: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]]:
    """A panel for each mean and kind of question, a line for each method; the dashed line keeps all tokens.

    Returns:
        The figure, and its data.
    """
    shares = by_method(result)
    costs = sorted({cost for _, cost in shares})
    methods = list(dict.fromkeys(method for method, _ in shares))
    kinds = list(next(iter(shares.values())))
    order = [*kinds[-2:], *kinds[:-2]]
    columns = 4
    figure, axes = panels(-(-len(order) // columns), columns)
    data: dict[str, Any] = {"figure": "comparison", "panels": {}}
    whole: Mapping[str, Any] = next((case["accuracy"] for case in result["cases"] if case["profile"] == STOCK), {})
    for axis, kind in zip(axes, order, strict=False):
        lines = [
            Line(
                method,
                tuple(float(cost) for cost in costs if (method, cost) in shares),
                tuple(shares[method, cost][kind] for cost in costs if (method, cost) in shares),
            )
            for method in methods
        ]
        draw(axis, lines)
        if kind in whole:
            axis.axhline(100 * whole[kind]["value"], color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(costs, [str(cost) for cost in costs])
        axis.set(title=kind, xlabel="visual tokens per layer, mean", ylabel="right answers, %")
        data["panels"][kind] = [line.to_dict() for line in lines]
    for axis in axes[len(order) :]:
        axis.axis("off")
    axes[0].legend(fontsize=7)
    return figure, data
