"""Models before they are trained: weights to start with, and growth in depth, both after a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from eos_search.training.batches import FRAME_PATCHES
from eos_search.training.recipe import CLUTTER1, Recipe
from eos_vllm.models.model_files import model_config


def build(layers: int, recipe: Recipe = CLUTTER1) -> Any:
    """A LLaVA of the recipe's shape with so many decoder layers, weights fresh from the default generator."""
    config = model_config(recipe.shape)
    config["text_config"]["num_hidden_layers"] = layers
    del config["architectures"], config["model_type"]
    model = LlavaForConditionalGeneration(LlavaConfig(**config))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 0.8)
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter.data.mul_(0.4)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
    _start_tower(model.model.vision_tower, recipe)
    if recipe.pointers:
        for layer in model.model.language_model.layers:
            _look_for_the_same(layer.self_attn)
    return model


def frame_waves(width: int) -> torch.Tensor:
    """Sines and cosines of the row and the column of every patch of the frame, ``[patches, width]``."""
    axis = torch.arange(FRAME_PATCHES).float()
    frequency = (1 / 40) ** (torch.arange(width // 4).float() / (width // 4 - 1))
    waves = torch.cat([(axis[:, None] * frequency).sin(), (axis[:, None] * frequency).cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, FRAME_PATCHES, -1), waves[None].expand(FRAME_PATCHES, -1, -1)], dim=-1)
    return grid.reshape(FRAME_PATCHES * FRAME_PATCHES, width)


def _start_tower(tower: Any, recipe: Recipe) -> None:
    """Sine-cosine positions, and queries near keys, so that a patch begins by looking at its neighbourhood."""
    width = recipe.shape.vision_hidden_size
    grid = frame_waves(width)
    with torch.no_grad():
        nn.init.zeros_(tower.embeddings.class_embedding)
        tower.embeddings.position_embedding.weight[1:] = grid
        tower.embeddings.position_embedding.weight[0] = 0
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * recipe.shape.patch_size**2) ** -0.5)
        for layer in tower.encoder.layers:
            _look_for_the_same(layer.self_attn)


@torch.no_grad()
def _look_for_the_same(attention: Any) -> None:
    """Queries near keys: a token begins by looking at those that are like it."""
    noise = 0.5 * torch.randn_like(attention.k_proj.weight) * attention.k_proj.weight.shape[1] ** -0.5
    attention.q_proj.weight.copy_(attention.k_proj.weight + noise)


def grow(shallow: Any, recipe: Recipe = CLUTTER1) -> Any:
    """The full depth from a shallow model: its layers at the recipe's places, new ones pass everything on at first.

    The recipe's ``copied`` layers start with the queries and keys of another one.
    """
    model = build(recipe.depth, recipe)
    wanted = model.state_dict()
    for name, value in shallow.state_dict().items():
        parts = name.split(".")
        if "layers" in parts and "language_model" in parts:
            index = parts.index("layers") + 1
            parts[index] = str(recipe.places[int(parts[index])])
        wanted[".".join(parts)] = value.clone()
    prefix = "model.language_model.layers"
    for layer in set(range(recipe.depth)) - set(recipe.places):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            wanted[f"{prefix}.{layer}.{part}.weight"].zero_()
    for new, old in recipe.copied:
        for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj"):
            wanted[f"{prefix}.{new}.{part}.weight"] = wanted[f"{prefix}.{old}.{part}.weight"].clone()
    model.load_state_dict(wanted)
    return model


class Mixture(nn.Module):
    """A learned mean of what leaves the decoder layers, each scaled to size 1: no layer is told to hold anything."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean of ``[n, d]`` of each layer."""
        scaled = torch.stack([F.rms_norm(hidden, hidden.shape[-1:]) for hidden in layers])
        return torch.einsum("l,lnd->nd", self.weight.softmax(dim=0), scaled)

    def grown(self, recipe: Recipe) -> "Mixture":
        """For the full depth: old layers keep their weights, new ones start with that of the old layer below them."""
        weight = self.weight.detach()
        below = [sum(place <= layer for place in recipe.places) - 1 for layer in range(recipe.depth)]
        return Mixture(weight[torch.tensor(below, device=weight.device).clamp(min=0)].clone())
