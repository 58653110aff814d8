"""Diversity alone: each next patch is the one farthest from those chosen (DivPrune, arXiv 2503.02175)."""

from typing import Literal

import torch

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import Features, TowerOutput, ascending, first_max


class MaxMin(Selector):
    """Greedy max-min of cosine distance, from the patch on whose nearest neighbour is farthest."""

    rule: Literal["maxmin"] = "maxmin"
    features: Features = "projected"

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        distance = 1.0 - tower.cosine(self.features)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        rows = torch.arange(tower.images, device=distance.device)
        pick = first_max(distance.amin(dim=-1))
        chosen, nearest = [pick], distance[rows, pick]
        nearest[rows, pick] = -torch.inf
        for _ in range(keep - 1):
            pick = first_max(nearest)
            chosen.append(pick)
            nearest = torch.minimum(nearest, distance[rows, pick])
            nearest[rows, pick] = -torch.inf
        return Choice(ascending(chosen))
