"""Eq. 12 of the paper: the share that is kept as the weight of every kept token among the keys of later layers.

Its slope asks what happens if all kept tokens are attended a little less, most of all the most important ones; losing
the tokens at the boundary, which is what a smaller count means, has no path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eos_search.flow import Flow, Reduction, Run, straight
from eos_vllm.core.layout import ReducerStep

# Where no query looks at the image at all, no score is above another.
_SCORE_FLOOR = 1e-12


@dataclass(frozen=True)
class Equation12:
    """Eq. 12 as a weight of keys.

    Attributes:
        alpha: boundary sharpness for scores divided by their mean.
        served: whether, under a budget that counts are scaled to, the gradient goes through that scaling. Without, it
            is that of Theta's own shares, which those counts don't have.
    """

    alpha: float = 10.0
    served: bool = False

    def at_reducer(self, flow: Flow, did: Reduction) -> None:
        """See :class:`eos_search.estimators.base.KeepEstimator`."""
        values, index = did.run.values, did.mark.index
        dropped = values.gate[index] * values.discard[index]
        if self.served and did.run.structure.budget is not None:
            dropped = 1 - did.run.soft.shares[did.place]
        keep = keep_probability(did.step, did.scores, dropped, self.alpha, len(did.mark.positions))
        flow.presence = flow.presence + straight(keep.index_select(0, did.source))

    def slopes(self, run: Run, row: int, loss: Callable[[int, int], float]) -> torch.Tensor | None:
        """See :class:`eos_search.estimators.base.KeepEstimator`."""
        return None


def keep_probability(
    step: ReducerStep, scores: Sequence[torch.Tensor], dropped: torch.Tensor, alpha: float, rows: int
) -> torch.Tensor:
    """Eq. 12: how surely each token is kept, with a path for gradients to the share that is dropped.

    Args:
        step: layout of the reducer.
        scores: importance of the images of each group ``[B, N]``.
        dropped: g c, a scalar.
        alpha: boundary sharpness for scores divided by their mean.
        rows: tokens in front of the reducer.

    Returns:
        ``[rows]`` float32; 0 for text and for images that are not reduced.
    """
    ratio = (1 - dropped) / (1 - dropped.detach())
    keep = torch.zeros(rows, device=dropped.device)
    for group, received in zip(step.groups, scores, strict=True):
        fixed = received.detach()
        threshold = fixed.topk(group.keep, dim=1).values[:, -1:]
        sharpness = alpha / fixed.mean(dim=1, keepdim=True).clamp(min=_SCORE_FLOOR)
        chance = torch.sigmoid(sharpness * (received - threshold)) * ratio
        places = group.first_visual.unsqueeze(1) + torch.arange(group.total, device=keep.device)
        keep = keep.index_put((places,), chance.to(keep.dtype))
    return keep
