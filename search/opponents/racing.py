"""Successive halving (Jamieson and Talwalkar, 2016), the same for all opponents.

A group is judged on a few images; the best third of it is judged on three times as many, and so on up to all images.
Images are added, not changed: a score is that of all questions so far, which are the same for everyone.
"""

import math
from collections.abc import Callable, Sequence

from eos_search.opponents.base import Candidate, Opponent, Outcome

FACTOR = 3


class SpentError(Exception):
    """The budget is spent: the judge takes no more."""


def rungs(first: int, images: int) -> tuple[int, ...]:
    """Images of each rung: ``first``, then three times as many each, and all in the end.

    Args:
        first: at least 1.
        images: all of them, at least ``first``.
    """
    found = [first]
    while found[-1] * FACTOR < images:
        found.append(found[-1] * FACTOR)
    return (*found, images) if found[-1] < images else tuple(found)


def race(opponent: Opponent, score: Callable[[int, Candidate, int], float], steps: int) -> bool:
    """Races group after group until the budget is spent or the opponent has nothing left.

    Args:
        opponent: who proposes.
        score: judges candidate ``number`` on a rung, given all rungs before; raises :class:`SpentError` at the end.
        steps: number of rungs.

    Returns:
        Whether the budget ended it.
    """
    first = 0
    try:
        while group := opponent.propose():
            opponent.learn(_race_group(group, score, steps, first))
            first += len(group)
    except SpentError:
        return True
    return False


def _race_group(
    group: Sequence[Candidate], score: Callable[[int, Candidate, int], float], steps: int, first: int
) -> list[Outcome]:
    scores: list[list[float]] = [[] for _ in group]
    standing = list(range(len(group)))
    for rung in range(steps):
        for i in standing:
            scores[i].append(score(first + i, group[i], rung))
        best = sorted(standing, key=lambda i: (-scores[i][-1], i))
        # In the order of their numbers, so that what is asked does not depend on small differences more than it must.
        standing = sorted(best[: math.ceil(len(best) / FACTOR)])
    return [Outcome(c, tuple(s), len(s) == steps) for c, s in zip(group, scores, strict=True)]
