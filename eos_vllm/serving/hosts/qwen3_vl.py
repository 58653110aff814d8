"""Qwen3-VL, images only: features of early tower layers are added to the output of the first decoder layers."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eos_vllm.serving.contract import Takes
from eos_vllm.serving.hosts.host import Host, check_rows_selector
from eos_vllm.serving.hosts.mrope import GridHostMixin, GridProcessorMixin, grids


class EosQwen3VLProcessor(GridProcessorMixin, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor with counts."""


@MULTIMODAL_REGISTRY.register_processor(
    EosQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class EosQwen3VLForConditionalGeneration(GridHostMixin, Qwen3VLForConditionalGeneration):
    """vLLM's class with reducers.

    What the tower adds to a layer's output (deepstack) follows the tokens that are left: a reducer behind such a layer
    scores and mixes what has been added to.
    """

    def eos_layers_added_to(self) -> int:
        """One for each tower layer that is added."""
        return self.deepstack_num_level if self.use_deepstack else 0

    def eos_take_added(self, tokens: int) -> Sequence[torch.Tensor]:
        """Out of vLLM's buffers, which are empty then, as behind vLLM's own pass: the next step would add it again."""
        held: Any = self._get_deepstack_input_embeds(tokens)
        if held is None:
            return ()
        taken = [held[f"deepstack_input_embeds_{i}"].clone() for i in range(self.eos_layers_added_to())]
        self._clear_deepstack_input_embeds(tokens)
        return taken


_MODEL = "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration"
HOST = Host(
    "Qwen3-VL",
    ("qwen3_vl_text",),
    check_rows_selector,
    grids=grids,
    reliances=(
        Takes(f"{_MODEL}.get_mrope_input_positions", ("input_tokens", "mm_features")),
        Takes(f"{_MODEL}._get_deepstack_input_embeds", ("num_tokens",)),
        Takes(f"{_MODEL}._clear_deepstack_input_embeds", ("num_tokens",)),
        Takes("vllm.model_executor.models.qwen3_vl:Qwen3LLMModel.forward", ("positions", "deepstack_input_embeds")),
    ),
)
