"""What an estimator of "how much" has to offer, and which there are."""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch

from eos_search.flow import Flow, Reduction, Run

KeepName = Literal["eq12", "eq12_served", "ghosts", "differences"]
KEEP_NAMES: tuple[KeepName, ...] = get_args(KeepName)


class KeepEstimator(Protocol):
    """Gives discards and acting gates a gradient; it changes no value of the pass, and no gradient of other kinds."""

    def at_reducer(self, flow: Flow, did: Reduction) -> None:
        """During a pass with gradients: adds zeros that carry them to ``flow``, which stands behind the reducer."""

    def slopes(self, run: Run, row: int, loss: Callable[[int, int], float]) -> torch.Tensor | None:
        """Behind a pass: how the loss rises with the logarithm of each count ``[R]``.

        Args:
            run: the pass.
            row: the example's number in the data.
            loss: of the hard pass in which the reducer at a place leaves so many tokens of an image.

        Returns:
            None where nothing is to be added.
        """
