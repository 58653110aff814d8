"""What a number of visual tokens per layer comes to by a measure, in tokens that every layer would see instead.

The same measures as a profile's (:func:`eos_vllm.core.budget.cost`), differentiable.
"""

from typing import Literal

import torch

from eos_vllm.core.budget import TEXT_TOKENS

SearchMeasure = Literal["final", "layer_average", "kv_bytes", "flops"]


def tokens_of(
    entering: torch.Tensor | float, left: torch.Tensor, measure: SearchMeasure, crossover: int | None = None
) -> torch.Tensor:
    """What the search holds against B.

    Args:
        entering: visual tokens of an image that layer 0 sees: N0, or what a reducer before the decoder leaves.
        left: what each decoder layer leaves of them ``[L]``.
        measure: ``final``: what the last layer leaves. ``layer_average`` and ``kv_bytes``: the mean over layers of what
            each sees, which is what each caches. ``flops``: so many tokens without reduction cost the same FLOPs.
        crossover: tokens at which attention costs as much as a layer's matrices; for ``flops`` only.
    """
    if measure == "final":
        return left[-1]
    if measure != "flops":
        return (entering + left[:-1].sum()) / len(left)
    assert crossover is not None  # settings ask the model for it
    first = torch.as_tensor(entering, dtype=left.dtype, device=left.device)
    rows = torch.cat([first.reshape(1), left[:-1]]) + TEXT_TOKENS
    mean = (rows * (1 + rows / crossover)).mean()
    return (torch.sqrt(1 + 4 * mean / crossover) - 1) * crossover / 2 - TEXT_TOKENS
