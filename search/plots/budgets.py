"""Fig. 7: accuracy against the budget, and the margin of one profile over another, from raw results of evaluations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eos_search.ablations.tables import differences_to
from eos_search.accuracy import AVERAGE
from eos_search.figures import accuracy_figure
from eos_search.plots.canvas import Line, draw, panels
from eos_vllm.core.errors import EosError


def budgets_data(result: Mapping[str, Any]) -> dict[str, Any]:
    """The points of Fig. 7a-c: for each kind of question and profile, percent and interval by budget."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        for kind, share in case["accuracy"].items():
            point = {name: 100 * share[name] for name in ("value", "low", "high")}
            about = {"profile": case["profile"], "budget": case["budget"], "questions": share["questions"]}
            lines.setdefault(kind, []).append(about | point)
    return {"figure": "budgets", "percent": lines, "chance": result["chance"]}


def write_budgets_figure(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fig. 7a-c, as ``eos-search evaluate --figure`` draws it; returns its data."""
    accuracy_figure(result, file)
    return budgets_data(result)


def margin_figure(result: Mapping[str, Any], ours: str, theirs: str) -> tuple[Figure, dict[str, Any]]:
    """Fig. 7d: points that ``ours`` is above ``theirs`` at each budget, on average and by kind, paired.

    Args:
        result: raw result with both profiles.
        ours: profile.
        theirs: profile that is subtracted.

    Returns:
        The figure, and its data.

    Raises:
        EosError: the result lacks one of them, or has no budget with both.
    """
    names = list(dict.fromkeys(case["profile"] for case in result["cases"]))
    for field, name in (("--profile", ours), ("--against", theirs)):
        if name not in names:
            raise EosError(field, name, "the result has no such profile", f"choose from {', '.join(names)}")
    apart = {b: shares for (name, b), shares in differences_to(result, theirs).items() if name == ours and b}
    if not apart:
        raise EosError("--against", theirs, f"there is no budget with both it and {ours}", "evaluate both at some")
    budgets = sorted(apart)
    kinds = [AVERAGE, *(kind for kind in next(iter(apart.values())) if kind != AVERAGE)]
    lines = [Line(kind, tuple(map(float, budgets)), tuple(apart[b][kind] for b in budgets)) for kind in kinds]
    figure, axes = panels(1, 2, width=4.4, height=3.4)
    draw(axes[0], lines[:1], ["black"])
    draw(axes[1], lines[1:])
    for axis, title in zip(axes, ("average", "by kind of question"), strict=True):
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.set(title=title, xlabel="visual tokens kept per image", ylabel=f"points over {theirs}")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{ours} minus {theirs}, paired, 95 % intervals")
    return figure, {
        "figure": "margin",
        "profile": ours,
        "against": theirs,
        "points": [line.to_dict() for line in lines],
    }
