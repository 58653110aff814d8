"""Maximal marginal relevance: saliency against likeness to what is chosen (the rule of IDPruner, 2026)."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import Features, Score, TowerOutput, ascending, first_max


class MMR(Selector):
    """Greedily ``trade * saliency - (1 - trade) * largest cosine to those chosen``; saliency is scaled to 0..1."""

    rule: Literal["mmr"] = "mmr"
    score: Score = "received_attention"
    features: Features = "projected"
    trade: float = Field(default=0.5, ge=0, le=1)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        cosine, saliency = tower.cosine(self.features), tower.score(self.score, self.features)
        low, high = saliency.amin(dim=1, keepdim=True), saliency.amax(dim=1, keepdim=True)
        value = self.trade * (saliency - low) / (high - low).clamp(min=1e-12)
        rows = torch.arange(tower.images, device=cosine.device)
        taken = torch.zeros_like(value, dtype=torch.bool)
        pick = first_max(value)
        chosen, near = [pick], cosine[rows, pick]
        taken[rows, pick] = True
        for _ in range(keep - 1):
            pick = first_max((value - (1 - self.trade) * near).masked_fill(taken, -torch.inf))
            chosen.append(pick)
            taken[rows, pick] = True
            near = torch.maximum(near, cosine[rows, pick])
        return Choice(ascending(chosen))
