"""Salient patches, evenly spaced ones, and weighted neighbours (PruMerge+, arXiv 2403.15388) at a fixed count."""

from typing import Literal

import torch

from eos_vllm.core.importance import complement, top_k
from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import LAST, TowerOutput, cosine, rows_of, spread

_NEIGHBOURS = 32


class PruMergePlus(Selector):
    """A quarter of K by CLS attention, then evenly spaced patches, then one token for all that is gone.

    The published count follows from each image's outliers, and its layer is behind those that serve (LLaVA-1.5 reads
    features of the last but one); here the count is the budget's and the layer the last that runs. As published: each
    kept patch adds its 32 nearest others by key, weighted by attention, and the last token is the weighted sum of the
    patches never kept. Order: salient by attention, evenly spaced, sum. Keys and attention are means over heads, where
    the publication takes one head of full width.
    """

    rule: Literal["prumerge_plus"] = "prumerge_plus"

    mixes = True

    @property
    def score_name(self) -> Literal["cls_attention"]:
        """The score that ranks and weighs."""
        return "cls_attention"

    def reads_layers(self) -> tuple[int, ...]:
        """The last layer."""
        return (LAST,)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        score, features = tower.cls_attention(), tower.vision.float()
        patches = max(1, keep - 1)
        salient = max(1, patches // 4)
        ranked = score.sort(dim=-1, descending=True, stable=True).indices[:, :salient]
        rest = complement(ranked.sort(dim=1).values, tower.total)
        places = spread(patches - salient, rest.shape[1], rest.device)
        kept = torch.cat([ranked, rest[:, places]], dim=1)
        keys = tower.mean_keys()
        alike = cosine(rows_of(keys, kept), keys).scatter(2, kept.unsqueeze(-1), -torch.inf)
        near = top_k(alike, min(_NEIGHBOURS, tower.total - 1))  # [B, patches, 32]
        weights = torch.zeros_like(alike).scatter(2, near, 1.0) * score.unsqueeze(1)
        tokens = rows_of(features, kept) + weights @ features
        if keep > 1:
            gone = torch.ones_like(score).scatter(1, kept, 0.0) * score
            tokens = torch.cat([tokens, gone.unsqueeze(1) @ features], dim=1)
        return Choice(kept.sort(dim=1).values, tokens.to(tower.vision.dtype))
