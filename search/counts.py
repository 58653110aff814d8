"""How the counts of a hard reduction depend on gates and discards: the differentiable side of Eq. 11 and paper 2.6.

A loss has a slope over the logarithm of each count; what that means for gates and discards is arithmetic, and stands
here once for all estimators. Directions of Theta that leave every count as it is get the gradient 0: raising all shares
to one power, where a budget is served that the counts are scaled to.
"""

import math
from dataclasses import dataclass

import torch

from eos_search.structure import Rules, Structure
from eos_search.theta import ThetaValues


@dataclass(frozen=True)
class SoftCounts:
    """Counts before rounding, differentiable in Theta, for the reducers that act.

    Attributes:
        logs: logarithm of what each leaves of an image ``[R]``; no gradient where it is held at the minimum.
        shares: share of its tokens that each keeps ``[R]``, rescaled to the budget that is served.
    """

    logs: torch.Tensor
    shares: torch.Tensor


def soft_counts(values: ThetaValues, structure: Structure, rules: Rules) -> SoftCounts:
    """The counts of ``structure`` as functions of Theta.

    Args:
        values: the point that ``structure`` was read from.
        structure: acting layers, and the budget that is served, if any.
        rules: number of visual tokens, and the minimum.
    """
    total = rules.model.visual_tokens
    assert total is not None  # the search is for a fixed number
    acting = list(structure.acting)
    own = torch.log1p(-values.gate[acting] * values.discard[acting])
    if structure.budget is not None and acting:
        power = 0.0 if structure.budget >= total else math.log(structure.budget / total) / own.sum()
        own = own * power
    logs = math.log(total) + own.cumsum(dim=0)
    return SoftCounts(logs.clamp(min=math.log(min(rules.minimum, total))), own.exp())


def neighbours(counts: tuple[int, ...], place: int, total: int, width: float, minimum: int = 1) -> tuple[int, int]:
    """The counts of one reducer next to its own that leave all others as they are.

    Args:
        counts: of all reducers, not increasing.
        place: index of the reducer.
        total: visual tokens of an image.
        width: how far to go, as a share of the count; one token at least.
        minimum: least count.

    Returns:
        The lower and the upper one; equal to the count itself where there is no room.
    """
    own = counts[place]
    step = max(1, round(width * own))
    before = counts[place - 1] if place else total
    behind = counts[place + 1] if place + 1 < len(counts) else minimum
    return max(own - step, min(behind, own), min(minimum, own)), min(own + step, before)
