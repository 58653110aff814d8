"""What the page's plans need of a vLLM configuration; the routes themselves know no engine."""

from functools import partial
from typing import TYPE_CHECKING

from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.core.errors import SettingError
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry
from eos_vllm.models.image_sizes import image_tokens
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
        size_tokens=None if sizes.visual_tokens is not None else partial(image_tokens, model),
    )


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
