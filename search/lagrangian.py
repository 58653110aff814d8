"""The token budget as a constraint that is met: an augmented Lagrangian, within a band around B that closes.

The penalty of Eq. 13 is met as far as its weight and the learning rate let it: discards overshoot, and the end is
anywhere below B. Here the budget pulls from both sides with a multiplier that learns its own size. After each update,
and each change of the gates' temperature, the discards of acting layers are moved, all shares by one power, to where
the count is within the band. That is a factor of 1.5 at the start and 1.005 at the end, so that the end meets B. Only
where gates leave no room (a gate of 0.6 keeps 40 % whatever its discard) can the count stay above it.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from eos_search.objective import Objective, tokens_left
from eos_search.structure import Rules, acting_of
from eos_search.theta import DISCARD_LIMIT, KINDS, Theta, ThetaValues

WIDEST = 1.5
# The multiplier learns slower than discards move, or the two swing.
_RATE = 0.1
_CLOSED = 1.005
# Where the band has closed, as a share of the steps: the rest of them settles.
_CLOSES = 0.9
_GATE, _DISCARD = KINDS.index("gate"), KINDS.index("discard")


class BudgetMultiplier:
    """Multiplier of the constraint ``log(tokens / B) = 0``; its state goes into checkpoints."""

    def __init__(self, weight: float) -> None:
        """``weight`` of the squared term; a tenth of it is what the multiplier grows by per unit of excess and step."""
        self.weight, self.value = weight, 0.0

    def term(self, tokens: torch.Tensor, budget: int) -> torch.Tensor:
        """``m h + w h^2 / 2`` for ``h = log(tokens / B)``."""
        excess = torch.log(tokens / budget)
        return self.value * excess + self.weight / 2 * excess.square()

    def update(self, tokens: float, budget: int) -> None:
        """After a step: the multiplier learns what is left of the excess."""
        self.value += _RATE * self.weight * math.log(tokens / budget)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.value = float(state["value"])


def band(step: int, steps: int) -> float:
    """Factor that the count may differ from B by after step ``step`` of ``steps``, to either side."""
    done = min(1.0, (step + 1) / (_CLOSES * steps))
    return float(WIDEST * (_CLOSED / WIDEST) ** done)


@torch.no_grad()
def project(theta: Theta, objective: Objective, rules: Rules, factor: float) -> bool:
    """Moves the discards of acting layers so that their count is within a factor of B; nothing where it is already.

    Args:
        theta: the search variables, changed in place.
        objective: B and its measure.
        rules: which gates act.
        factor: at least 1.

    Returns:
        Whether anything was moved.
    """
    values = theta()
    acting = acting_of(values, rules)
    tokens = _tokens(objective, values, acting, 1.0)
    low, high = objective.budget / factor, objective.budget * factor
    if not acting or low <= tokens <= high:
        return False
    target = min(max(tokens, low), high)
    few, many = -12.0, 12.0  # logarithms of the power; the count falls with it
    for _ in range(80):
        middle = (few + many) / 2
        if _tokens(objective, values, acting, math.exp(middle)) > target:
            few = middle
        else:
            many = middle
    # The end of the last interval that lies within the band.
    power = math.exp(many if tokens > high else few)
    moved = _powered(values.table, acting, power)[list(acting), _DISCARD]
    theta.raw[list(acting), _DISCARD] = moved.clamp(1e-9, DISCARD_LIMIT).logit() / theta.ranges.discard_scale
    return True


def _tokens(objective: Objective, values: ThetaValues, acting: tuple[int, ...], power: float) -> float:
    moved = replace(values, table=_powered(values.table, acting, power))
    return tokens_left(objective, moved, acting).item()


def _powered(table: torch.Tensor, acting: tuple[int, ...], power: float) -> torch.Tensor:
    """Theta with the shares of acting layers raised to a power, as far as their gates allow."""
    moved, rows = table.clone(), list(acting)
    gate = table[rows, _GATE]
    share = (1 - gate * table[rows, _DISCARD]) ** power
    moved[rows, _DISCARD] = ((1 - share) / gate).clamp(max=DISCARD_LIMIT)
    return moved
