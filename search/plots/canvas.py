"""How figures look, and how they are written: a PNG, and beside it the data that it shows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eos_search.accuracy import Share
from eos_vllm.core.errors import EosError

MARKS = "osD^vPX*<>"
# matplotlib lists every key that it knows as a literal; ours are written out here.
STYLE: Any = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
_DPI = 130


@dataclass(frozen=True)
class Line:
    """A line of shares with their 95 % intervals over ``x``."""

    label: str
    x: tuple[float, ...]
    shares: tuple[Share, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in percent."""
        points = [
            {"x": x, "value": 100 * s.value, "low": 100 * s.low, "high": 100 * s.high, "questions": s.questions}
            for x, s in zip(self.x, self.shares, strict=True)
        ]
        return {"label": self.label, "points": points}


def panels(rows: int, columns: int, width: float = 3.6, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each ``width`` by ``height`` inches, and its axes row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw(axis: Axes, lines: Sequence[Line], colours: Sequence[Any] | None = None) -> None:
    """Draws lines with marks, and their intervals as bands."""
    for number, line in enumerate(lines):
        colour = colours[number] if colours else f"C{number % 10}"
        values, low, high = (100 * np.array([getattr(s, end) for s in line.shares]) for end in ("value", "low", "high"))
        axis.plot(line.x, values, marker=MARKS[number % len(MARKS)], markersize=4, color=colour, label=line.label)
        axis.fill_between(line.x, low, high, alpha=0.15, color=colour, linewidth=0)


def budget_colours(budgets: Sequence[int]) -> list[Any]:
    """The smaller the budget, the darker its colour; in the order given."""
    from matplotlib import colormaps

    order = sorted(budgets, reverse=True)
    return [colormaps["viridis_r"](0.2 + 0.75 * order.index(b) / max(1, len(order) - 1)) for b in budgets]


def save(figure: Figure, file: Path, data: Mapping[str, Any]) -> Path:
    """Writes the PNG and beside it its data, and returns the data's file.

    Args:
        figure: what was drawn.
        file: the PNG.
        data: what it shows, and where that comes from, as plain data.

    Raises:
        EosError: another kind of file, or it cannot be written.
    """
    check_png(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Neither date nor version inside: the same data give the same file.
        figure.savefig(file, dpi=_DPI, metadata={"Software": None})
    except OSError as error:
        raise EosError("--out", str(file), f"cannot be written ({error.strerror})", "name another file") from None
    return save_data(file, data)


def save_data(file: Path, data: Mapping[str, Any]) -> Path:
    """Writes the data of a figure beside its PNG."""
    beside = file.with_suffix(".json")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return beside


def check_png(file: Path) -> None:
    """Whether a figure can have this name.

    Raises:
        EosError: another kind of file.
    """
    if file.suffix != ".png":
        raise EosError("--out", str(file), "is no PNG", "give a name that ends in .png")


def share_of(case: Mapping[str, Any], kind: str) -> Share:
    """Accuracy of a case of a raw result for a kind of question.

    Raises:
        EosError: it has no such kind.
    """
    if kind not in case["accuracy"]:
        raise EosError("--kind", kind, "the result has no such kind", f"choose from {', '.join(case['accuracy'])}")
    return Share(**case["accuracy"][kind])


def budgets_of(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """Budgets of cases, descending."""
    return sorted({case["budget"] for case in cases if case["budget"] is not None}, reverse=True)


def stock_line(axis: Axes, cases: Sequence[Mapping[str, Any]], kind: str) -> None:
    """A dashed line at the accuracy of the unreduced model, where the result holds it."""
    for case in cases:
        if case["profile"] == "none":
            value = 100 * share_of(case, kind).value
            axis.axhline(value, color="black", linestyle="--", linewidth=1, label="all tokens")


def blank(axes: Sequence[Axes]) -> None:
    """Takes the frames of panels that are not used."""
    for axis in axes:
        axis.axis("off")
