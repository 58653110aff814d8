"""LLaVA-OneVision, images only: as LLaVA-NeXT with a SigLIP tower, larger grids made smaller again."""

from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.serving.hosts import llava_next as row_ends
from eos_vllm.serving.hosts.base import EosHostMixin
from eos_vllm.serving.hosts.host import Host
from eos_vllm.serving.hosts.llava_next import ROW_ENDS, RowEndsMixin, grids, image_token

_TILING = "anyres_max_9"


class EosLlavaOnevisionProcessor(RowEndsMixin, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor with counts and row ends."""


@MULTIMODAL_REGISTRY.register_processor(
    EosLlavaOnevisionProcessor, info=LlavaOnevisionProcessingInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class EosLlavaOnevisionForConditionalGeneration(EosHostMixin, LlavaOnevisionForConditionalGeneration):
    """vLLM's class with reducers."""


def check(profile: Profile, config: Any) -> None:
    """Refuses another tiling than the one that vLLM takes for granted, beside what LLaVA-NeXT refuses.

    Raises:
        SettingError: one of these.
    """
    if (tiling := getattr(config, "vision_aspect_ratio", _TILING)) != _TILING:
        problem = f"vLLM tiles images by {_TILING} whatever the model says, so that its answers are not the model's"
        raise SettingError("model.vision_aspect_ratio", tiling, problem, f"serve a model of {_TILING}")
    row_ends.check(profile, config)


HOST = Host("LLaVA-OneVision", ("qwen2",), check, image_token, grids, ROW_ENDS)
