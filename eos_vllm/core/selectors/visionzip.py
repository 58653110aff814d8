"""Dominant patches, the CLS token, and means of the rest (VisionZip, arXiv 2412.04467), exactly."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.importance import complement, top_k
from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import LAST, TowerOutput, cosine, first_max, rows_of


class VisionZip(Selector):
    """K tokens: the CLS token, the dominant patches by its attention, and ``contextual`` of K that stand for the rest.

    Every n-th patch of the rest, in raster order, is a target; each other one goes to the target whose key (mean over
    heads) is most alike, and adds the mean of all that went there. Order: CLS token, dominants, contextuals.
    """

    rule: Literal["visionzip"] = "visionzip"
    # 10 of 64, 20 of 128, 30 of 192 in the publication.
    contextual: float = Field(default=5 / 32, ge=0, lt=1)

    mixes = True
    reads_cls = True

    def reads_layers(self) -> tuple[int, ...]:
        """The last layer."""
        return (LAST,)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        assert tower.cls is not None
        contextual = min(int(keep * self.contextual + 0.5), keep - 1)
        dominant = keep - contextual - 1
        kept = top_k(tower.cls_attention(), dominant)
        parts = [tower.cls.unsqueeze(1), rows_of(tower.vision, kept)]
        if contextual:
            rest = complement(kept, tower.total)
            step = max(1, rest.shape[1] // contextual)
            here = (torch.arange(contextual, device=rest.device) * step).unsqueeze(0)
            there = complement(here, rest.shape[1])
            targets, others = rest[:, here[0]], rest[:, there[0]]
            keys, features = tower.mean_keys(), tower.vision.float()
            goes_to = first_max(cosine(rows_of(keys, others), rows_of(keys, targets)))  # [B, others]
            # [B, others, contextual]
            share = (goes_to.unsqueeze(-1) == torch.arange(contextual, device=rest.device)).float()
            added = share.mT @ rows_of(features, others) / share.sum(dim=1).clamp(min=1).unsqueeze(-1)
            parts.append((rows_of(features, targets) + added).to(tower.vision.dtype))
            kept = torch.cat([kept, targets], dim=1)
        # The CLS token is no patch: fewer patches than tokens are kept.
        return Choice(kept.sort(dim=1).values, torch.cat(parts, dim=1))
