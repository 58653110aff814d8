"""Random search: points drawn at random from the space, each from a random generator of its own."""

import math
import random
from collections.abc import Sequence

from eos_search.opponents.base import WIDTH, Candidate, Outcome
from eos_search.opponents.space import Space


class RandomSearch:
    """Draws points for ever, and learns nothing."""

    def __init__(self, space: Space, seed: int, width: int = WIDTH) -> None:
        """``width`` profiles in a group."""
        self.space, self.seed, self.width, self.drawn = space, seed, width, 0

    def propose(self) -> list[Candidate]:
        """As :class:`~eos_search.opponents.base.Opponent`."""
        numbers = range(self.drawn, self.drawn + self.width)
        self.drawn += self.width
        return [Candidate(self.space.draw(RandomChooser(f"{self.seed}/{number}"))) for number in numbers]

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing."""


class RandomChooser:
    """Even draws."""

    def __init__(self, seed: str) -> None:
        """Of a seed."""
        self.numbers = random.Random(f"opponent/{seed}")

    def number(self, name: str, low: float, high: float, log: bool = False) -> float:
        """As :class:`~eos_search.opponents.base.Chooser`."""
        if not log:
            return self.numbers.uniform(low, high)
        return min(max(math.exp(self.numbers.uniform(math.log(low), math.log(high))), low), high)

    def whole(self, name: str, low: int, high: int) -> int:
        """As :class:`~eos_search.opponents.base.Chooser`."""
        return self.numbers.randint(low, high)

    def one_of(self, name: str, options: Sequence[str]) -> str:
        """As :class:`~eos_search.opponents.base.Chooser`."""
        return self.numbers.choice(options)
