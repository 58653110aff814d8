"""The frozen model that is searched on: loaded, checked, and what a profile says about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from eos_search.settings import SearchSettings
from eos_vllm.analysis.cost import flops_crossover
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import ModelSpec
from eos_vllm.models.geometry import ModelGeometry, geometry

EMBEDDED = "embedded"
_REMEDY = "give the directory of a Hugging Face LLaVA with a Llama-family language model, its weights and processor"


@dataclass(frozen=True)
class Frozen:
    """Model and processor, the model part of a profile, and whether flash-attn can run the unreduced pass."""

    model: Any
    processor: Any
    spec: ModelSpec
    flash_reference: bool


def model_path(name: str) -> str:
    """The directory behind a model's name: ``embedded`` is the one that comes with the project."""
    if name != EMBEDDED:
        return name
    from eos_vllm.models.embedded import path

    return str(path())


def model_sizes(name: str) -> ModelGeometry:
    """Sizes of a model that can be searched on.

    Raises:
        EosError: no such directory, no LLaVA, or one that takes images of any size.
    """
    path = model_path(name)
    try:
        sizes = geometry(path if Path(path).exists() else AutoConfig.from_pretrained(path))
    except (OSError, ValueError) as error:
        if isinstance(error, EosError):
            raise
        raise SettingError("model", name, f"it cannot be found ({error})", _REMEDY) from None
    if sizes.visual_tokens is None:
        problem = f"a {sizes.architecture} takes images of any size, for which there is no search yet"
        raise SettingError("model", name, problem, "name a LLaVA-1.5")
    return sizes


def model_spec(settings: SearchSettings) -> ModelSpec:
    """What a searched profile says about its model, whose weights are not loaded for it.

    Raises:
        EosError: as :func:`model_sizes`.
    """
    sizes = model_sizes(settings.model)
    return ModelSpec(
        architecture=sizes.architecture,
        num_decoder_layers=sizes.num_decoder_layers,
        visual_tokens=sizes.visual_tokens,
        # Only where the budget is counted so: profiles of other searches say no more than they need.
        flops_crossover=flops_crossover(sizes) if settings.budget_measure == "flops" else None,
    )


def load_frozen(settings: SearchSettings, device: torch.device) -> Frozen:
    """Loads the model of a search onto a device.

    Raises:
        EosError: no such directory, no LLaVA, or a language model whose attention is built otherwise.
    """
    path, spec = model_path(settings.model), model_spec(settings)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = wanted.get(settings.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    disable_progress_bar()
    try:
        # sdpa takes the additive mask that carries gradients; flash-attn doesn't.
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingError("model", settings.model, f"it cannot be loaded ({error})", _REMEDY) from None
    check_family(settings.model, model)
    return Frozen(
        model.to(device),
        processor,
        spec,
        device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available(),
    )


def check_family(name: str, model: Any) -> None:
    """Whether scores can be computed from a layer's projections as they are.

    Raises:
        SettingError: the decoder layers are not built like Llama's.
    """
    layers = getattr(getattr(getattr(model, "model", None), "language_model", None), "layers", None)
    first = layers[0] if layers else None
    attention = getattr(first, "self_attn", None)
    parts = ("q_proj", "k_proj", "head_dim", "scaling")
    fits = hasattr(first, "input_layernorm") and all(hasattr(attention, part) for part in parts)
    if not fits or hasattr(attention, "q_norm"):
        kind = type(first).__name__ if first is not None else type(model).__name__
        raise SettingError("model", name, f"its decoder ({kind}) is not of the Llama family", _REMEDY)
