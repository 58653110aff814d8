"""Moves of reducers to other layers, judged by the hard loss.

A gate that does not act has a derivative at its closed end only, which says little of a reducer that takes most tokens
out: by it a gate opens where the budget pulls, or closes where Adam makes a step of a gradient that is next to nothing.
Here a reducer, as it is, is put behind every other layer, and the loss of the same rows is taken again: a place may be
good though those next to it are not. What moves are whole rows of Theta.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

import torch

from eos_search.theta import Theta

Change = TypeVar("Change")


class Move(NamedTuple):
    """The reducer behind layer ``here`` goes to ``there``, where none acts; the two rows of Theta change places."""

    here: int
    there: int


def moves_of(acting: Collection[int], places: Collection[int]) -> list[Move]:
    """Every move of one acting reducer to a place where none acts."""
    inside = [layer for layer in acting if layer in places]
    return [Move(here, there) for here in inside for there in sorted(places) if there not in acting]


def moved(table: torch.Tensor, move: Move) -> torch.Tensor:
    """A copy of the rows ``[L, 7]``, two of which have changed places."""
    order = list(range(len(table)))
    order[move.here], order[move.there] = move.there, move.here
    return table[order]


@torch.no_grad()
def best_gain(
    changes: Sequence[Change],
    losses: torch.Tensor,
    penalties: Sequence[float],
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> Change | None:
    """The change that lowers the loss most, if it does by more than the standard error of that difference over rows.

    Args:
        changes: at least one.
        losses: of each row ``[1 + changes, rows]`` as it is and after each change.
        penalties: the same for what is no mean over rows, ``1 + changes``.
        add_up: sums over all processes.
    """
    gains = (losses[:1] - losses[1:]).double()
    rows = gains.new_full((1,), gains.shape[1])
    sums = add_up(torch.cat([gains.sum(dim=1), gains.square().sum(dim=1), rows]))
    first, second, count = sums[: len(changes)], sums[len(changes) : -1], float(sums[-1])
    if count < 2:  # no standard error
        return None
    mean = first / count
    error = ((second / count - mean.square()).clamp(min=0) / (count - 1)).sqrt()
    gain = [m + penalties[0] - other for m, other in zip(mean.tolist(), penalties[1:], strict=True)]
    sure = [g - e for g, e in zip(gain, error.tolist(), strict=True)]
    best = max(range(len(changes)), key=lambda index: sure[index])
    return changes[best] if sure[best] > 0 and math.isfinite(sure[best]) else None


@torch.no_grad()
def carry_out(move: Move, theta: Theta, optimizer: torch.optim.Optimizer) -> None:
    """Changes two rows of Theta, and of what the optimizer remembers of them."""
    theta.raw.copy_(moved(theta.raw, move))
    for name, value in optimizer.state.get(theta.raw, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == theta.raw.shape:
            optimizer.state[theta.raw][name] = moved(value, move)
