"""What the page's plans need of a vLLM configuration; the routes themselves know no engine."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.core.errors import SettingError
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry
from eos_vllm.page.plan import PlanContext
from eos_vllm.serving.options import planner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def plan_context(vllm_config: "VllmConfig") -> PlanContext:
    """Planner, sizes of the model, and KV cache of a server with a profile.

    Raises:
        SettingError: a KV cache of values whose size is not known.
    """
    planner, model = planner_of(vllm_config), str(vllm_config.model_config.model)
    assert planner is not None  # the page is refused without a profile
    sizes = geometry(vllm_config.model_config.hf_config)
    return PlanContext(
        planner=planner,
        geometry=sizes,
        model="embedded" if embedded.is_this(model) else model,
        dtype=kv_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype),
        block_size=vllm_config.cache_config.block_size,
        size_tokens=None if sizes.visual_tokens is not None else size_counter(vllm_config.model_config),
    )


def size_counter(model_config: Any) -> Callable[[int, int], int]:
    """What counts the visual tokens of an image of a width and height, as this server does it.

    By vLLM's own processing info, which knows ``--mm-processor-kwargs`` and ``--revision``. All that it needs of the
    model's files is read here: no request may wait for them, or ask a network.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info: Any = MULTIMODAL_REGISTRY.get_processing_info(model_config)
    more: dict[str, Any] = {}
    if "image_processor" in inspect.signature(info.get_num_image_tokens).parameters:  # Qwen's
        more = {"image_processor": info.get_image_processor(), "mm_kwargs": {}}

    def count(width: int, height: int) -> int:
        try:
            return int(info.get_num_image_tokens(image_width=width, image_height=height, **more))
        except ValueError as error:
            problem = f"the model's processor takes no such image ({' '.join(str(error).split())})"
            raise SettingError("size", [width, height], problem, "give another, or visual_tokens") from None

    count(224, 224)
    return count


def kv_dtype(cache: str, model: object) -> str:
    """Type of the KV cache as plans name it, from ``--kv-cache-dtype`` and the model's own.

    Raises:
        SettingError: none whose size is known.
    """
    name = str(model).removeprefix("torch.") if cache == "auto" else cache
    name = "fp8" if name.startswith("fp8") else name
    if name not in DTYPE_BYTES:
        problem = "plans of the page do not know the size of its values"
        raise SettingError("kv-cache-dtype", cache, problem, f"leave --eos-page out, or take {', '.join(DTYPE_BYTES)}")
    return name
