"""Saliency-weighted coverage: the patches in which all others find themselves again (SCOPE, arXiv 2510.24214)."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import Features, Score, TowerOutput, ascending, first_max


class Coverage(Selector):
    """Greedy facility location: what a patch adds to the others' largest cosine, times its saliency to ``alpha``.

    Gains lie close together: a difference in the last bits of a tower's output can end in another choice.
    """

    rule: Literal["coverage"] = "coverage"
    score: Score = "cls_attention"
    features: Features = "vision"
    alpha: float = Field(default=1.0, ge=0, le=10)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        cosine = tower.cosine(self.features)
        weight = tower.score(self.score, self.features).clamp(min=1e-12) ** self.alpha
        rows = torch.arange(tower.images, device=cosine.device)
        covered = torch.zeros_like(weight)
        taken = torch.zeros_like(weight, dtype=torch.bool)
        chosen = []
        for _ in range(keep):
            gain = (cosine - covered.unsqueeze(1)).clamp_(min=0).sum(dim=-1) * weight
            pick = first_max(gain.masked_fill(taken, -torch.inf))
            chosen.append(pick)
            taken[rows, pick] = True
            covered = torch.maximum(covered, cosine[rows, pick])
        return Choice(ascending(chosen))
