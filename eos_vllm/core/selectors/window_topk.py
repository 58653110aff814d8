"""Salient patches of every window of the picture, and the most salient of all (VScan's first stage, 2505.22654)."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.importance import top_k
from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import LAST, TowerOutput


class WindowTopK(Selector):
    """Half of the count, as far as it divides by the windows, by a shallow layer's CLS attention within each window.

    Windows choose first; the rest goes to the highest CLS attention of the last layer among the patches that none
    chose. (The published code drops what does not divide by the windows.)
    """

    rule: Literal["window_topk"] = "window_topk"
    window: int = Field(default=6, ge=1)
    shallow_layer: int = Field(default=5, ge=0)

    @property
    def score_name(self) -> Literal["cls_attention"]:
        """The score of the global half."""
        return "cls_attention"

    def reads_layers(self) -> tuple[int, ...]:
        """The shallow layer and the last one."""
        return (self.shallow_layer, LAST)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        places = _windows(tower.total, self.window, tower.vision.device)  # [windows, patches]
        each = keep // 2 // len(places)
        score = tower.cls_attention()
        chosen = torch.empty(tower.images, 0, dtype=torch.int64, device=score.device)
        if each:
            within = top_k(tower.cls_attention(self.shallow_layer)[:, places], each)  # [B, windows, each]
            chosen = places.expand(tower.images, -1, -1).gather(2, within).flatten(1)
            score = score.scatter(1, chosen, -torch.inf)
        return Choice(torch.cat([chosen, top_k(score, keep - chosen.shape[1])], dim=1).sort(dim=1).values)


def _windows(total: int, window: int, device: torch.device) -> torch.Tensor:
    """Raster indices of the patches of each square window; the whole picture is one where windows do not fit."""
    side = int(total**0.5)
    if side * side != total or side % window:
        return torch.arange(total, device=device).unsqueeze(0)
    across = side // window
    grid = torch.arange(total, device=device).view(across, window, across, window)
    return grid.transpose(1, 2).reshape(across * across, window * window)
