"""Which estimator of "how much" is right: each against differences of the hard loss over Theta's own discards.

The reference moves one discard so far that its layer keeps ``exp(width)`` times more, and less, and takes the loss of
the hard pass that Theta then means: with the counts of Eq. 11, or with those that a served budget scales to. Later
counts follow, so that the whole of an estimator is tested: what it says of a count, and what a discard does to counts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eos_search.ablations.verdicts import BRUTE, summarise
from eos_search.estimators.base import KEEP_NAMES, KeepName
from eos_search.estimators.choice import keep_estimator
from eos_search.examples import Prepared
from eos_search.objective import Objective, reference_rows
from eos_search.raw import write_raw
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.structure import Rules, read_structure
from eos_search.task import example_terms
from eos_search.theta import KINDS
from eos_vllm.core.errors import EosError

STUDY = "gradients"
_DISCARD = KINDS.index("discard")
_SAME = ("study", "model", "weights", "data", "settings", "points", "tables", "budgets", "width", "keep_width")
# What is written of a number; a difference of two losses in float32 has no more.
_DIGITS = 6


@dataclass(frozen=True)
class Point:
    """A place in Theta where gradients are compared: its name and values ``[L, 7]``."""

    name: str
    table: torch.Tensor


@dataclass(frozen=True)
class Question:
    """An example of the study, with the rows of its unreduced pass."""

    id: str
    kind: str
    example: Prepared
    reference: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """What the gradients are taken of.

    Attributes:
        model: a frozen Hugging Face LLaVA.
        rules: what is not learned.
        objective: the task loss.
        alpha: boundary sharpness of Eq. 12.
        keep_width: how far ghosts and differences look.
        width: how far the reference moves the logarithm of a share.
    """

    model: Any
    rules: Rules
    objective: Objective
    alpha: float = 10.0
    keep_width: float = 0.1
    width: float = 0.15

    def question(self, name: str, kind: str, example: Prepared) -> Question:
        """An example with its unreduced pass."""
        states = RelaxedModel(self.model, self.rules).reference(example, self.objective.aligned)
        return Question(name, kind, example, reference_rows(self.objective, example, states))

    @property
    def visual_tokens(self) -> int:
        """Of an image."""
        return self.objective.visual_tokens

    def loss(
        self, question: Question, table: torch.Tensor, budget: int | None, keep: KeepName = "eq12"
    ) -> torch.Tensor:
        """Task loss of the hard pass at ``table`` ``[L, 7]``; with gradients if that asks for them."""
        values = self.rules.values(table)
        estimator = keep_estimator(keep, self.alpha, self.keep_width)
        model = RelaxedModel(self.model, self.rules, Relaxation(explore=False, keep=estimator))
        structure = read_structure(values, self.rules, budget)
        return example_terms(model, self.objective, question.example, values, structure, question.reference).total

    def gradient(self, question: Question, point: Point, budget: int | None, keep: KeepName) -> list[float]:
        """What an estimator says of the discard of each acting layer."""
        table = point.table.clone().requires_grad_()
        self.loss(question, table, budget, keep).backward()
        assert table.grad is not None
        return [_short(table.grad[layer, _DISCARD].item()) for layer in self.acting(point)]

    @torch.no_grad()
    def differences(self, question: Question, point: Point, budget: int | None) -> list[float]:
        """The reference: two-sided differences over the discard of each acting layer."""
        found = []
        for layer in self.acting(point):
            gate, discard = point.table[layer, 0].item(), point.table[layer, _DISCARD].item()
            share = 1 - gate * discard
            losses, places = [], []
            for sign in (1, -1):
                # A discard stays within its range: nothing is dropped at 0.
                moved = min(max((1 - share * math.exp(-sign * self.width)) / gate, 0.0), 1 - 1e-6)
                table = point.table.clone()
                table[layer, _DISCARD] = moved
                losses.append(self.loss(question, table, budget).item())
                places.append(moved)
            found.append(_short((losses[0] - losses[1]) / (places[0] - places[1])))
        return found

    def acting(self, point: Point) -> tuple[int, ...]:
        """Layers that act at a point."""
        return read_structure(self.rules.values(point.table), self.rules).acting


def mode(point: str, budget: int | None) -> str:
    """How a point under a budget is called in results."""
    return f"{point}, own counts" if budget is None else f"{point}, budget {budget}"


def run_gradients(
    bench: Bench,
    points: Sequence[Point],
    budgets: Sequence[int | None],
    questions: Sequence[Callable[[], Question]],
    header: Mapping[str, Any],
    out: Path | None,
    earlier: Mapping[str, Any] | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """The study, question by question.

    Args:
        bench: model and loss.
        points: where.
        budgets: retain budgets that counts are scaled to; None for the counts of Eq. 11.
        questions: makers of the questions, in order.
        header: what else stands in the result.
        out: file of the raw result, written behind every question.
        earlier: what that file held; its questions are not measured again.
        progress: told of each question.

    Returns:
        A raw result: ``rows`` with the gradients of each question, by mode and estimator, a number for each acting
        layer; ``summary`` and ``default`` of :func:`eos_search.ablations.verdicts.summarise`.

    Raises:
        EosError: ``earlier`` is another study, or one of other points; or a point at which no gate acts.
    """
    layers = {point.name: list(bench.acting(point)) for point in points}
    if idle := [name for name, acting in layers.items() if not acting]:
        raise EosError("points", idle[0], "no gate acts there: no count has a gradient", "give a point with reducers")
    told = {point.name: {"layers": layers[point.name], "discards": _discards(point)} for point in points}
    result: dict[str, Any] = {
        **header,
        "study": STUDY,
        "points": told,
        "tables": {point.name: [list(map(_short, row)) for row in point.table.tolist()] for point in points},
        "budgets": list(budgets),
        "width": bench.width,
        "keep_width": bench.keep_width,
    }
    result["rows"] = list(_rows_of(earlier, result))
    for make in questions[len(result["rows"]) :]:
        question = make()
        gradients = {}
        for point in points:
            for budget in budgets:
                found = {BRUTE: bench.differences(question, point, budget)}
                found |= {name: bench.gradient(question, point, budget, name) for name in KEEP_NAMES}
                gradients[mode(point.name, budget)] = found
        result["rows"].append({"id": question.id, "kind": question.kind, "gradients": gradients})
        result |= summarise(result)
        if out is not None:
            write_raw(out, result)
        progress(1)
    return result | summarise(result)


def _rows_of(earlier: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if earlier is None:
        return
    for name in _SAME:
        # Studies of before they were kept have no settings and tables.
        if earlier.get(name, now.get(name)) != now.get(name):
            raise EosError("--out", name, "the file holds a study with another one", "name another file")
    yield from earlier["rows"]


def _discards(point: Point) -> list[float]:
    return [_short(value) for value in point.table[:, _DISCARD].tolist()]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
