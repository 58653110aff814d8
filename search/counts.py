"""How the counts of a hard reduction depend on gates and discards: the differentiable side of Eq. 11 and paper 2.6.

A loss has a slope over the logarithm of each count; what that means for gates and discards is arithmetic, and stands
here once for all estimators. Directions of Theta that leave every count as it is get the gradient 0: raising all shares
to one power, where a budget is served that the counts are scaled to.
"""

import math
from dataclasses import dataclass

import torch

from eos_search.measures import tokens_of
from eos_search.structure import Rules, Structure
from eos_search.theta import ThetaValues

# Powers beyond this leave nothing of any share.
_STEEPEST = 1 << 20
_HALVINGS = 50
# Estimators divide by shares, and those of a cost that layers cannot have would be 0.
_LEAST_SHARE = 1e-12


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
        own = own * _power(own, structure, rules, values.depth)
    logs = math.log(total) + own.cumsum(dim=0)
    return SoftCounts(logs.clamp(min=math.log(min(rules.minimum, total))), own.exp().clamp(min=_LEAST_SHARE))


def _power(own: torch.Tensor, structure: Structure, rules: Rules, depth: int) -> torch.Tensor | float:
    """The power to which the budget that is served raises all shares, given their logarithms ``own`` ``[R]``.

    Differentiable: where the measure has no closed form, by the derivative of the implicit function.
    """
    total, budget = rules.model.visual_tokens, structure.budget
    assert total is not None
    assert budget is not None
    if budget >= total:
        return 0.0
    if rules.measure == "final":
        return math.log(budget / total) / own.sum()

    def cost_at(power: torch.Tensor | float, logs: torch.Tensor) -> torch.Tensor:
        left = (total * (power * logs).cumsum(dim=0).exp()).clamp(min=min(rules.minimum, total))
        return _cost(left, structure, rules, depth)

    with torch.no_grad():
        low, high = 0.0, 1.0
        while cost_at(high, own) > budget and high < _STEEPEST:
            low, high = high, 2 * high
        if high >= _STEEPEST:  # these layers cannot cost so little, and no share changes that
            return high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if cost_at(middle, own) > budget else (low, middle)
    power = own.new_tensor(high, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(cost_at(power, own.detach()), power)
    if slope == 0:  # all counts are at the minimum
        return high
    # A step of Newton from the solution: nothing in value.
    there = cost_at(high, own)
    return high - (there - there.detach()) / slope


def _cost(left: torch.Tensor, structure: Structure, rules: Rules, depth: int) -> torch.Tensor:
    """What unrounded counts behind each reducer ``[R]`` come to by the measure of the rules."""
    assert rules.model.visual_tokens is not None
    tokens = torch.cat([left.new_full((1,), float(rules.model.visual_tokens)), left])
    entering = tokens[int(structure.before)]
    behind = [tokens[sum(acts <= layer for acts in structure.acting)] for layer in range(depth)]
    if rules.withdraw is not None:
        behind[rules.withdraw :] = [torch.zeros_like(entering)] * (depth - rules.withdraw)
    return tokens_of(entering, torch.stack(behind), rules.measure, rules.model.flops_crossover)


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
