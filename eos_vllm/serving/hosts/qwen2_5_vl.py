"""Qwen2.5-VL, images only."""

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eos_vllm.serving.contract import Takes
from eos_vllm.serving.hosts.host import Host, check_rows_selector
from eos_vllm.serving.hosts.mrope import GridHostMixin, GridProcessorMixin, grids


class EosQwen25VLProcessor(GridProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor with counts."""


@MULTIMODAL_REGISTRY.register_processor(
    EosQwen25VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class EosQwen2_5_VLForConditionalGeneration(GridHostMixin, Qwen2_5_VLForConditionalGeneration):
    """vLLM's class with reducers."""


HOST = Host(
    "Qwen2.5-VL",
    ("qwen2_5_vl_text",),
    check_rows_selector,
    grids=grids,
    reliances=(
        Takes(
            "vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
            ("input_tokens", "mm_features"),
        ),
    ),
)
