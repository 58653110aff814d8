"""Models that can be served with a profile: one file per family, found by architecture.

A family's file holds its :class:`~eos_vllm.serving.hosts.host.Host`, what is checked of its configuration, and its
model classes: vLLM's own with :class:`~eos_vllm.serving.hosts.base.EosHostMixin` in front. Files are imported only when
a model of the family is served. How to add one is in ``docs/hosts.md``.
"""

from importlib import import_module
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.serving.hosts.host import Host

# Architecture to the file of its family.
FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}
# Those whose processors take videos, too.
TAKE_VIDEOS = (
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)


def model_classes() -> dict[str, str]:
    """What ``model_class_overrides`` needs: our class of each architecture."""
    return {name: f"{__name__}.{file}:Eos{name}" for name, file in FAMILIES.items()}


def host_of(model_config: Any) -> Host:
    """The host of a model.

    Raises:
        SettingError: its architecture is none of :data:`FAMILIES`.
    """
    architectures = list(model_config.architectures or [])
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        remedy = f"serve one of {', '.join(FAMILIES)}, or leave out --eos-profile"
        raise SettingError("model", model_config.model, f"its architecture is {architectures}", remedy)
    return import_module(f"{__name__}.{FAMILIES[known[0]]}").HOST
