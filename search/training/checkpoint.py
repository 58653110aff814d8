"""The trained model as files under the published tensor names, weights in float16."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from eos_search.training.recipe import CLUTTER1, Recipe
from eos_vllm.core.errors import EosError
from eos_vllm.models.model_files import write_model_files
from eos_vllm.models.tiny import tensor_shapes

_RENAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def published_name(name: str) -> str:
    """Name of a tensor in the published llava-hf checkpoints, from its name in transformers."""
    for ours, theirs in _RENAMES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_model(model: Any, directory: Path, recipe: Recipe = CLUTTER1) -> None:
    """Writes every file of a model of a recipe to an existing directory.

    Raises:
        RuntimeError: the model has other tensors than the recipe's shape says.
        EosError: a weight is no finite number in float16.
    """
    tensors = {published_name(name): value.to(torch.float16) for name, value in model.state_dict().items()}
    found, wanted = {name: tuple(value.shape) for name, value in tensors.items()}, tensor_shapes(recipe.shape)
    if found != wanted:
        odd = sorted(found.items() ^ wanted.items())[0]
        raise RuntimeError(f"the trained model is not of the recipe's shape: {odd}")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise EosError("weights", name, "hold what float16 cannot", "train again with a lower rate")
    write_model_files(recipe.shape, directory, recipe.benchmark.words)
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    (directory / "model.safetensors").write_bytes(save(contiguous, metadata={"format": "pt"}))
