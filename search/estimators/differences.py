"""Two-sided finite differences of the hard loss over each count: right up to curvature, and as noisy as the data.

A pass with another count at one reducer equals the pass at hand up to that reducer, and goes on from there: parts of
2 R forward passes without gradients for each example that is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch

from eos_search.flow import Flow, Reduction, Run


@dataclass(frozen=True)
class Differences:
    """Finite differences of the hard loss.

    Attributes:
        width: how far each count moves to either side, as a share of it; one token at least.
        every: measure every so many rows of the data, which are in random order, and let each stand for so many. What
            is measured depends on nothing but the row, so that a search that was stopped goes on as it would have.
    """

    width: float = 0.1
    every: int = 1

    def at_reducer(self, flow: Flow, did: Reduction) -> None:
        """See :class:`eos_search.estimators.base.KeepEstimator`; all is done behind the pass."""

    def slopes(
        self, run: Run, row: int, loss: Callable[[int, int], float], places: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """See :class:`eos_search.estimators.base.KeepEstimator`; ``places``: reducers to measure, all where None."""
        if row % self.every:
            return None
        found = torch.zeros_like(run.soft.logs, requires_grad=False)
        for place in range(len(run.structure.counts)) if places is None else places:
            low, high = run.room(place, self.width)
            if low < high:
                # Where there is no room to one side, that is the count itself and the difference one-sided.
                rise = (loss(place, high) - loss(place, low)) / (log(high) - log(low))
                found[place] = rise * self.every
        return found
