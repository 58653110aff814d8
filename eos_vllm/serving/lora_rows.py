"""Adapters of the tokens that are left: LoRA kernels read one adapter index per row, and rows go away.

Symptom without it: the first layer behind a reducer multiplies by adapters of other requests, or fails on a shape.
Cause: vLLM maps rows to adapters once per step. Why safe: the mapping is put back at the end of the pass, for vLLM does
not set it again while the batch stays the same. Can go when the mapping travels with the hidden states.
"""

from typing import Any

import torch


class LoraRows:
    """The adapter of each row of a step, following the rows."""

    def __init__(self, wrapper: Any, tokens: int) -> None:
        self.wrapper = wrapper
        self.before = wrapper.token_lora_indices.clone()
        self.now = self.before[:tokens]

    @classmethod
    def of(cls, decoder: Any, tokens: int) -> "LoraRows | None":
        """That of a decoder's step of ``tokens`` rows; None where no adapters are served."""
        for module in decoder.layers.modules():
            if (wrapper := module.__dict__.get("punica_wrapper")) is not None:
                return cls(wrapper, tokens)
        return None

    def follow(self, source: torch.Tensor) -> None:
        """Rows that go on, and where they came from ``[rows]``."""
        self.now = self.now.index_select(0, source)
        self._set(self.now)

    def restore(self) -> None:
        """As vLLM set it."""
        self._set(self.before)

    def _set(self, indices: torch.Tensor) -> None:
        wrapper = self.wrapper
        wrapper._token_lora_indices[: len(indices)].copy_(indices)
        wrapper.indices_len[0] = len(indices)
        if hasattr(wrapper, "token_mapping_meta"):  # Triton's kernels
            wrapper.token_mapping_meta.prepare_tensors(wrapper.token_lora_indices)
        elif wrapper.is_prefill:
            wrapper._update_prefill_metadata(wrapper.token_lora_indices)
