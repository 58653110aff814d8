"""LLaVA-1.5: a fixed number of patches per image, a CLIP tower that selectors may look into, contiguous tokens."""

import math
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.serving.hosts.base import EosHostMixin
from eos_vllm.serving.hosts.host import Grid, GridOf, Host
from eos_vllm.serving.image_processor import build_processor
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.preselection import Preselection


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class EosLlavaForConditionalGeneration(EosHostMixin, LlavaForConditionalGeneration):
    """vLLM's class with reducers."""

    def eos_takes_images(self) -> bool:
        """Whether this process has a vision tower; vLLM leaves it out where images are switched off."""
        return hasattr(self.vision_tower, "vision_model")

    def eos_selection(self, planner: Any, vllm_config: VllmConfig, counters: Counters) -> Preselection:
        """Selectors see the tower's features, layers and CLS token."""
        return Preselection(planner, self, vllm_config, counters)


def check(profile: Profile, config: Any) -> None:
    """Refuses Pixtral, and towers that do not give what the profile's selector reads.

    Raises:
        SettingError: one of these.
    """
    if (kind := config.vision_config.model_type) == "pixtral":
        raise SettingError("model.vision_config.model_type", kind, "images of varying length", "serve a CLIP LLaVA")
    if profile.selector is not None:
        check_tower(profile, config)


def check_tower(profile: Profile, config: Any) -> None:
    """Whether the vision tower gives what the profile's selector reads.

    Raises:
        SettingError: it does not.
    """
    assert profile.selector is not None
    rule, tower = profile.selector.rule, config.vision_config.model_type  # type: ignore[attr-defined]
    if not isinstance(config.vision_feature_layer, int):
        problem = f"{rule} reads one layer's features, the model has those of several"
        raise SettingError("model.vision_feature_layer", config.vision_feature_layer, problem, "leave layer -1 out")
    depth = config.vision_config.num_hidden_layers
    built = config.vision_feature_layer + (depth + 1 if config.vision_feature_layer < 0 else 0)
    if (deepest := max(profile.selector.reads_layers(), default=0)) >= built:
        problem = f"{rule} reads tower layer {deepest}, and the model runs {built} of them"
        raise SettingError("profile.reducers.0.select", rule, problem, f"name a layer below {built}")
    if tower != "clip_vision_model":
        needs = "a CLS token, which it lacks" if profile.selector.needs_cls else "a CLIP tower; no other is proven"
        raise SettingError("model.vision_config.model_type", tower, f"{rule} needs {needs}", "serve a CLIP LLaVA")
    if (strategy := config.vision_feature_select_strategy) != "default":
        problem = "its CLS token is a visual token"
        raise SettingError("model.vision_feature_select_strategy", strategy, problem, "leave layer -1 out")


def grids(model_config: Any) -> GridOf:
    """A square of patches; it covers what the processor leaves of the image, which for CLIP's is its middle."""

    def grid(data: Any, tokens: int) -> Grid:
        side = math.isqrt(tokens)
        return Grid(side, side) if side * side == tokens else Grid()

    return grid


HOST = Host("LLaVA-1.5", ("llama", "mistral", "qwen2"), check, grids=grids)
