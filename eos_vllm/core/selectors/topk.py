"""The K most salient patches; with CLS attention that is FasterVLM (arXiv 2412.01818)."""

from typing import Literal

from eos_vllm.core.importance import top_k
from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import Score, TowerOutput


class TopK(Selector):
    """Highest scores first, equal ones by lower index."""

    rule: Literal["topk"] = "topk"
    score: Score = "cls_attention"

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        return Choice(top_k(tower.score(self.score), keep))
