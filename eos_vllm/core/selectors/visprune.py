"""Half by saliency, half by pruning what is twice there (VisPruner, arXiv 2412.01818v2)."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import Features, Score, TowerOutput, cosine, rows_of

_DROPPED_AT_ONCE = 8


class VisPrune(Selector):
    """``share`` of the count by saliency. The rest, most salient first, is thinned until the count is met.

    In each round every other patch of the list, from the first on, is held against those between: the (at most 8) most
    alike go, the others move to the front of the list, most alike first. That order decides who meets whom in the next
    round: a difference in the last bit of a tower's output can end in another choice.
    """

    rule: Literal["visprune"] = "visprune"
    score: Score = "cls_attention"
    features: Features = "vision"
    share: float = Field(default=0.5, ge=0, le=1)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        ranked = tower.score(self.score, self.features).sort(dim=-1, descending=True, stable=True).indices
        salient = int(keep * self.share)
        rest, wanted = ranked[:, salient:], keep - salient
        features = tower.features(self.features)
        while (left := rest.shape[1]) > wanted:
            even, odd = rest[:, ::2], rest[:, 1::2]
            dropped = min(_DROPPED_AT_ONCE, left - wanted, even.shape[1])
            if odd.shape[1] == 0:  # one patch left, and none is wanted
                rest = rest[:, :wanted]
                break
            alike = cosine(rows_of(features, even), rows_of(features, odd)).amax(dim=-1)
            stays = alike.sort(dim=-1, descending=True, stable=True).indices[:, dropped:]
            rest = torch.cat([even.gather(1, stays), odd], dim=1)
        return Choice(torch.cat([ranked[:, :salient], rest], dim=1).sort(dim=1).values)
