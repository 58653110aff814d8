"""What an opponent is: it proposes profiles in groups, and learns how far each of them came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from eos_vllm.core.profile import Profile

Method = Literal["random", "tpe", "one-knob"]
METHODS: tuple[Method, ...] = get_args(Method)
# Profiles in a group of random search and TPE, which could go on for ever.
WIDTH = 9


@dataclass(frozen=True)
class Candidate:
    """A profile to be judged.

    Attributes:
        profile: it has the wanted costs, with a schedule for each (:func:`eos_search.opponents.costs.at_costs`).
        about: what it is, as plain data for the log.
    """

    profile: Profile
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How far a candidate came.

    Attributes:
        candidate: the one that was proposed.
        scores: mean accuracy over the costs, 0 to 1, after each rung that it reached; at least one.
        finished: it was judged on all images.
    """

    candidate: Candidate
    scores: tuple[float, ...]
    finished: bool

    @property
    def rank(self) -> tuple[int, float]:
        """Orders outcomes, the best last: more rungs first of all, for scores of few images are luck."""
        return len(self.scores), self.scores[-1]


class Opponent(Protocol):
    """A way to find profiles. What it proposes depends on its seed and on what it has learned, and on nothing else."""

    def propose(self) -> list[Candidate]:
        """The next group to race; an empty one where nothing is left to try."""

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """How the group ended, in the order in which it was proposed."""


class Chooser(Protocol):
    """Where the values of a point of a search space come from; each has a name, which always has the same range."""

    def number(self, name: str, low: float, high: float, log: bool = False) -> float:
        """A number in ``[low, high]``; ``log``: its logarithm is what is even."""

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number in ``[low, high]``."""

    def one_of(self, name: str, options: Sequence[str]) -> str:
        """One of the options."""
