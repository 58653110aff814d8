"""The reducer before the decoder at work: the selector picks anchors, the operator acts, K tokens of an image are left.

Hugging Face reference and vLLM call these functions on what their vision tower gave; a prompt then holds K
placeholders, at contiguous positions as in all published methods of this kind (with M-RoPE each keeps its own).
"""

import torch
import torch.nn.functional as F

from eos_vllm.core.importance import complement
from eos_vllm.core.operator import OperatorParams, unified_operator
from eos_vllm.core.selectors import Choice, Selector, TowerOutput
from eos_vllm.core.selectors.tower import rows_of


def preselect(tower: TowerOutput, selector: Selector, params: OperatorParams, keep: int) -> torch.Tensor:
    """Visual tokens of each image that enter the decoder.

    Args:
        tower: what the vision tower gave of B images of N patches.
        selector: the rule.
        params: Omega of the reducer; the discarded tokens act on the anchors as everywhere else.
        keep: K; N or more keeps all.

    Returns:
        ``[B, min(K, N), d]``.
    """
    return tower.projected if keep >= tower.total else combine(tower, selector.choose(tower, keep), selector, params)


def combine(tower: TowerOutput, choice: Choice, selector: Selector, params: OperatorParams) -> torch.Tensor:
    """What a choice leaves of each image ``[B, K, d]``: the anchors, and what the operator adds to them."""
    if choice.features is not None:
        return tower.project(choice.features)
    anchors = rows_of(tower.projected, choice.kept)
    if params.is_identity:
        return anchors
    gone = complement(choice.kept, tower.total)
    scores = selector.saliency(tower).gather(1, gone)
    return unified_operator(anchors, rows_of(tower.projected, gone), scores, params)


def shrink_pixels(pixels: torch.Tensor, side: int, patch: int) -> torch.Tensor:
    """Processed images ``[B, 3, h, w]`` ``side`` patches of ``patch`` pixels wide and high (selector ``resize``)."""
    size = (side * patch, side * patch)
    return F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)


def shrink_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """A tower's table of positions ``[..., 1 + N, dv]``, CLS token first, for ``side * side`` patches."""
    whole = table.reshape(-1, *table.shape[-2:])
    before = int((whole.shape[1] - 1) ** 0.5)
    grid = whole[:, 1:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([whole[:, :1], patches], dim=1).reshape(*table.shape[:-2], 1 + side * side, table.shape[-1])
