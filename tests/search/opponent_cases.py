"""Spaces, sizes and scores for the tests of opponents; no model takes part."""

from collections.abc import Callable, Sequence
from typing import Any

from eos_search.opponents.base import Candidate, Opponent, Outcome
from eos_search.opponents.settings import DEFAULT_SELECTORS, QUERIES
from eos_search.opponents.space import Space
from eos_vllm.core.profile import ModelSpec, Profile
from eos_vllm.models import embedded
from eos_vllm.models.geometry import ModelGeometry, geometry


def make_space(depth: int = 8, costs: tuple[int, ...] = (128,), visual: int = 576, **changes: Any) -> Space:
    """The space of a model of any size."""
    model = ModelSpec(architecture="LlavaForConditionalGeneration", num_decoder_layers=depth, visual_tokens=visual)
    given: dict[str, Any] = {"max_reducers": 3, "selectors": DEFAULT_SELECTORS, "queries": QUERIES}
    return Space(model, costs, **(given | changes))


def embedded_sizes() -> ModelGeometry:
    """Those of the model that the packaged profiles were made for."""
    return geometry(str(embedded.path()))


def drive(opponent: Opponent, groups: int, score: Callable[[Profile], float]) -> list[list[Candidate]]:
    """Groups of an opponent whose candidates are all judged on one rung, by a made-up score."""
    found = []
    for _ in range(groups):
        if not (group := opponent.propose()):
            break
        found.append(group)
        opponent.learn([Outcome(candidate, (score(candidate.profile),), True) for candidate in group])
    return found


def datas(groups: Sequence[Sequence[Candidate]]) -> list[list[dict[str, Any]]]:
    """The profiles of groups as plain data."""
    return [[candidate.profile.to_dict() for candidate in group] for group in groups]


def most_gamma(profile: Profile) -> float:
    """A made-up score: the mean gamma."""
    return sum(reducer.gamma for reducer in profile.reducers) / len(profile.reducers)
