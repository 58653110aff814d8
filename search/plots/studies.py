"""Figures 4 to 6 and Table 9 from the raw results of ``eos-search ablate``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eos_search.ablations.tables import differences_to, reading_depth
from eos_search.ablations.variants import BASE, GRID, placement_label
from eos_search.accuracy import AVERAGE
from eos_search.plots.canvas import (
    Line,
    blank,
    budget_colours,
    budgets_of,
    draw,
    panels,
    share_of,
    stock_line,
)
from eos_vllm.core.errors import EosError

_RIGHT = "right answers, %"
_WITH_RANGE = f"{_RIGHT} (95 % interval)"
_MOST_WRITTEN = 64
_CE_OFF_GAP = 0.75


def alignment_figure(result: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]]:
    """Fig. 4: accuracy over the weight of the alignment, a panel per kind of question; CE-off stands apart.

    Returns:
        The figure, and its data.
    """
    cases = _cases(result, "alignment")
    kinds = [AVERAGE, *(kind for kind in cases[0]["accuracy"] if kind != AVERAGE)]
    searched = [case for case in cases if "lambda_align" in case]
    weights = sorted({case["lambda_align"] for case in searched if case["cross_entropy"]})
    budgets = budgets_of(searched)
    columns = min(4, len(kinds))
    figure, axes = panels(-(-len(kinds) // columns), columns)
    data: dict[str, Any] = {}
    off, colours = len(weights) - 1 + 2 * _CE_OFF_GAP, budget_colours(budgets)
    for axis, kind in zip(axes, kinds, strict=False):
        on_lines, off_lines = [], []
        for budget in budgets:
            at = [case for case in searched if case["budget"] == budget]
            on = sorted((c for c in at if c["cross_entropy"]), key=lambda c: c["lambda_align"])
            places = tuple(float(weights.index(case["lambda_align"])) for case in on)
            on_lines.append(Line(f"retain {budget}", places, tuple(share_of(case, kind) for case in on)))
            for share in (share_of(case, kind) for case in at if not case["cross_entropy"]):
                off_lines.append(Line(f"retain {budget}, CE off", (off,), (share,)))
                ends = [[100 * (share.value - share.low)], [100 * (share.high - share.value)]]
                colour = colours[budgets.index(budget)]
                axis.errorbar(off, 100 * share.value, ends, marker="X", color=colour, capsize=3)
        draw(axis, on_lines, colours)
        stock_line(axis, cases, kind)
        ticks = [f"{weight:g}" for weight in weights] + (["CE off"] if off_lines else [])
        axis.set_xticks([*range(len(weights)), *([off] if off_lines else [])], ticks, rotation=45)
        axis.set(title=kind, xlabel="weight of the alignment", ylabel=_WITH_RANGE)
        data[kind] = [line.to_dict() for line in on_lines + off_lines]
    axes[0].legend()
    blank(axes[len(kinds) :])
    return figure, {"figure": "alignment", "x": "index into weights; behind them CE off", "weights": weights, **data}


def placement_figure(result: Mapping[str, Any], kind: str = AVERAGE) -> tuple[Figure, dict[str, Any]]:
    """Fig. 5: a panel per reducer that moves alone, and a heat map per budget of the first and the last one.

    Returns:
        The figure, and its data.
    """
    cases = [case for case in _cases(result, "placement") if "layers" in case]
    base = [reducer["layer"] for reducer in result["base"]["reducers"]]
    budgets = budgets_of(cases)
    pairs = budgets if len(base) > 1 else []
    figure, axes = panels(1, len(base) + len(pairs))
    data: dict[str, Any] = {"figure": "placement", "kind": kind, "base": base, "lines": {}, "pairs": {}}
    for k, axis in zip(range(len(base)), axes, strict=False):
        lines = [_moved_alone(cases, base, k, budget, kind) for budget in budgets]
        draw(axis, lines, budget_colours(budgets))
        stock_line(axis, result["cases"], kind)
        axis.axvline(base[k], color="grey", linestyle=":", linewidth=1)
        title = f"reducer {k + 1}, others at {placement_label(_others(base, k))}"
        axis.set(title=title, xlabel="after decoder layer", ylabel=_WITH_RANGE)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        data["lines"][f"reducer {k + 1}"] = [line.to_dict() for line in lines]
    axes[0].legend()
    for budget, axis in zip(pairs, axes[len(base) :], strict=True):
        firsts, lasts, values = _pairs(cases, base, budget, kind)
        picture = axis.imshow(values, origin="lower", aspect="auto", cmap="viridis")
        figure.colorbar(picture, ax=axis, label=_RIGHT)
        axis.grid(visible=False)
        axis.set_xticks(range(len(lasts)), [str(layer) for layer in lasts])
        axis.set_yticks(range(len(firsts)), [str(layer) for layer in firsts])
        _write_values(axis, values)
        axis.plot(lasts.index(base[-1]), firsts.index(base[0]) + 0.3, marker="*", color="red", markersize=9)
        title = f"first and last together, retain {budget}"
        axis.set(title=title, xlabel="last reducer after layer", ylabel="first reducer after layer")
        shown = [[None if np.isnan(value) else float(value) for value in row] for row in values]
        data["pairs"][str(budget)] = {"first": firsts, "last": lasts, "percent": shown}
    return figure, data


def operator_figure(result: Mapping[str, Any], kind: str = AVERAGE) -> tuple[Figure, dict[str, Any]]:
    """Fig. 6: a row of panels per reducer, a panel per parameter; the base's own value is the dotted line.

    Returns:
        The figure, and its data.
    """
    cases = _cases(result, "operator")
    bases = [case for case in cases if case["profile"] == BASE]
    swept = [case for case in cases if "parameter" in case]
    names = [name for name in GRID if any(case["parameter"] == name for case in swept)]
    budgets = budgets_of(cases)
    reducers = result["base"]["reducers"]
    figure, axes = panels(len(reducers), max(1, len(names)))
    data: dict[str, Any] = {"figure": "operator", "kind": kind, "panels": []}
    for (k, reducer), row in zip(enumerate(reducers), _rows(axes, max(1, len(names))), strict=True):
        for name, axis in zip(names, row, strict=False):
            here = [case for case in swept if (case["reducer"], case["parameter"]) == (k, name)]
            if not here:
                axis.text(0.5, 0.5, "without effect here", ha="center", va="center", transform=axis.transAxes)
            points = [(case["value"], case) for case in here] + [(reducer[name], case) for case in bases if here]
            lines = [_line(f"retain {b}", [p for p in points if p[1]["budget"] == b], kind) for b in budgets]
            draw(axis, [line for line in lines if line.x], budget_colours(budgets))
            stock_line(axis, cases, kind)
            axis.axvline(reducer[name], color="grey", linestyle=":", linewidth=1)
            if name == "tau" and here:
                axis.set_xscale("log")
            axis.set(title=f"layer {reducer['layer']}: {name}", xlabel=name, ylabel=_WITH_RANGE)
            panel = {"layer": reducer["layer"], "parameter": name, "base": reducer[name]}
            data["panels"].append(panel | {"lines": [line.to_dict() for line in lines]})
    axes[0].legend()
    return figure, data


def robustness_figure(result: Mapping[str, Any], kind: str = AVERAGE) -> tuple[Figure, dict[str, Any]]:
    """Table 9 as a figure: points that each perturbed placement gains or loses, paired, a panel per budget.

    Returns:
        The figure, and its data.
    """
    cases = _cases(result, "robustness")
    apart = differences_to(result, BASE)
    budgets = budgets_of(cases)
    names = [name for name in dict.fromkeys(n for n, _ in apart) if all((name, budget) in apart for budget in budgets)]
    notes = {case["profile"]: case.get("note", "") for case in cases}
    figure, axes = panels(1, len(budgets), width=5.4, height=0.9 + 0.32 * len(names))
    data: dict[str, Any] = {"figure": "robustness", "kind": kind, "base": [], "points": {}}
    data["base"] = [reducer["layer"] for reducer in result["base"]["reducers"]]
    for number, (budget, axis) in enumerate(zip(budgets, axes, strict=True)):
        shares = [apart[name, budget][kind] for name in names]
        values = np.array([100 * share.value for share in shares])
        ends = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
        axis.errorbar(values, range(len(names)), xerr=ends, fmt="o", capsize=3)
        axis.axvline(0, color="grey", linewidth=1)
        labels = [f"{name}  {notes[name]}" if number == 0 else "" for name in names]
        axis.set_yticks(range(len(names)), labels)
        axis.invert_yaxis()
        label = f"points against {placement_label(data['base'])} (95 % interval, paired)"
        axis.set(title=f"retain {budget}", xlabel=label)
        data["points"][str(budget)] = [
            {"layers": name, "note": notes[name], "value": 100 * s.value, "low": 100 * s.low, "high": 100 * s.high}
            for name, s in zip(names, shares, strict=True)
        ]
    return figure, data


def reading_figure(result: Mapping[str, Any], kind: str = AVERAGE) -> tuple[Figure, dict[str, Any]]:
    """Accuracy over the layer behind which images are withdrawn, a line per kind; the dotted line is the reading depth.

    Returns:
        The figure, and its data.
    """
    cases = _cases(result, "reading")
    kinds = [kind, *(other for other in cases[0]["accuracy"] if other != kind)]
    figure, (axis,) = panels(1, 1, width=6.0, height=3.6)
    lines = [_line(name, [(case["layer"], case) for case in cases if "layer" in case], name) for name in kinds]
    draw(axis, lines)
    stock_line(axis, cases, kind)
    axis.axvline(depth := reading_depth(result, kind), color="grey", linestyle=":", linewidth=1)
    axis.set(xlabel="images withdrawn behind layer", ylabel=_WITH_RANGE)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=7)
    return figure, {"figure": "reading", "kind": kind, "depth": depth, "lines": [line.to_dict() for line in lines]}


def _cases(result: Mapping[str, Any], study: str) -> list[dict[str, Any]]:
    if result.get("study") != study:
        remedy = f"give the result of `eos-search ablate {study} --out`"
        raise EosError("--raw", result.get("study"), f"this is no study of {study}", remedy)
    return result["cases"]


def _moved_alone(cases: Sequence[Mapping[str, Any]], base: Sequence[int], k: int, budget: int, kind: str) -> Line:
    points = [
        (float(case["layers"][k]), case)
        for case in cases
        if case["budget"] == budget and _others(case["layers"], k) == _others(base, k)
    ]
    return _line(f"retain {budget}", points, kind)


def _pairs(
    cases: Sequence[Mapping[str, Any]], base: Sequence[int], budget: int, kind: str
) -> tuple[list[int], list[int], np.ndarray]:
    found = {
        (case["layers"][0], case["layers"][-1]): 100 * share_of(case, kind).value
        for case in cases
        if case["budget"] == budget and case["layers"][1:-1] == base[1:-1]
    }
    firsts, lasts = (sorted({place[end] for place in found}) for end in (0, 1))
    return firsts, lasts, np.array([[found.get((first, last), np.nan) for last in lasts] for first in firsts])


def _write_values(axis: Axes, values: np.ndarray) -> None:
    """The figures of a heat map in its cells, as long as they can be read there."""
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if values.size <= _MOST_WRITTEN and not np.isnan(value):
            colour = "white" if value <= middle else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7)


def _line(label: str, points: Sequence[tuple[float, Mapping[str, Any]]], kind: str) -> Line:
    ordered = sorted(points, key=lambda point: point[0])
    return Line(label, tuple(float(x) for x, _ in ordered), tuple(share_of(case, kind) for _, case in ordered))


def _others(layers: Sequence[int], k: int) -> list[int]:
    return [*layers[:k], *layers[k + 1 :]]


def _rows(axes: Sequence[Any], columns: int) -> list[Sequence[Any]]:
    return [axes[i : i + columns] for i in range(0, len(axes), columns)]
