"""Profiles, questions and replies for the tests of studies and figures; no model takes part."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eos_search.ablations.study import Study, run_study
from eos_search.ablations.variants import base_variant
from eos_search.answerers import Case
from eos_vllm.cluttervqa import Row
from eos_vllm.core.profile import Profile, parse_profile

KINDS = ("presence", "reading")


def make_profile(
    layers: Sequence[int] = (1, 2, 4), depth: int = 6, visual: int = 36, tokens: int = 6, **changes: Any
) -> Profile:
    """A profile of the small model; ``values`` (a mapping) replace those of all reducers, other changes fields."""
    values = {"gate": 1.0, "discard": 0.5, "gamma": 0.1, "tau": 0.3, "theta": 0.1, "rho": 0.2, "nu": 0.3}
    values |= changes.pop("values", {})
    model = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": depth, "visual_tokens": visual}
    budget = {"measure": changes.pop("measure", "final"), "tokens": tokens, "minimum": changes.pop("minimum", 1)}
    data = {"schema": "eos-profile/1", "name": "made up", "model": model, "budget": budget}
    return parse_profile(data | {"reducers": [{"layer": layer, **values} for layer in layers]} | changes)


def make_rows(images: int = 6) -> list[Row]:
    """Two questions of each kind about each image."""
    return [
        Row(f"{image}-{kind}-{n}", kind, "?", "yes", (Path(f"{image}.png"),), (), choices=2)
        for image in range(images)
        for kind in KINDS
        for n in range(2)
    ]


class FakeAnswerer:
    """Replies that are right for as many questions as ``right`` says of a case; it remembers what it was asked."""

    def __init__(self, right: Callable[[Case], int]) -> None:
        self.right = right
        self.asked: list[tuple[str, int | None]] = []

    def answer(self, rows: Sequence[Row], cases: Sequence[Case], progress: Callable[[int], Any]) -> list[list[str]]:
        """As :class:`eos_search.answerers.Answerer`."""
        self.asked += [(case.name, case.budget) for case in cases]
        progress(len(rows) * len(cases))
        return [["yes" if i < self.right(case) else "no" for i in range(len(rows))] for case in cases]


def by_layers(case: Case) -> int:
    """More right answers for larger budgets and later reducers; all for the unreduced model."""
    if case.profile is None:
        return 24
    return min(24, (case.budget or 6) // 2 + sum(case.profile.layers))


def study_result(
    name: str, profile: Profile, variants: Sequence[Any], budgets: Sequence[int] = (16, 4), out: Path | None = None
) -> dict[str, Any]:
    """The raw result of a study of made-up replies."""
    study = Study(name, (base_variant(profile), *variants), profile)
    header = {"model": "fake", "max_tokens": 8, "chance": {"average": 0.5}}
    return run_study(study, budgets, make_rows(), FakeAnswerer(by_layers), header, out, lambda _: lambda _: None)
