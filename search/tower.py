"""What the vision tower of a Hugging Face LLaVA gives a selector, and the tokens that then enter the decoder."""

import math
from collections.abc import MutableMapping
from typing import Any

import torch

from eos_vllm.core.budget import image_size
from eos_vllm.core.importance import top_k
from eos_vllm.core.preselection import combine, preselect, shrink_pixels
from eos_vllm.core.profile import Profile
from eos_vllm.core.selectors import LAST, Choice, QueriesAndKeys, Selector, TowerOutput
from eos_vllm.core.selectors.resize import Resize


@torch.no_grad()
def tower_output(model: Any, pixels: torch.Tensor, selector: Selector) -> TowerOutput:
    """Runs the tower on processed images ``[B, 3, h, w]``, and catches what ``selector`` reads of it.

    The tower has a CLS token, and ``vision_feature_layer`` is one layer.
    """
    config = model.config
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    depth, feature = config.vision_config.num_hidden_layers, config.vision_feature_layer
    last = (feature if feature >= 0 else depth + 1 + feature) - 1
    caught: dict[int, dict[str, torch.Tensor]] = {}
    hooks = []
    for number in selector.reads_layers():
        attention = tower.encoder.layers[last if number == LAST else number].self_attn
        seen = caught.setdefault(number, {})
        for name in ("q", "k"):
            projection = getattr(attention, f"{name}_proj")
            hooks.append(projection.register_forward_hook(lambda _, __, out, s=seen, n=name: s.__setitem__(n, out)))
    smaller = pixels.shape[-1] < config.vision_config.image_size
    try:
        states = model.model.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=smaller)
    finally:
        for hook in hooks:
            hook.remove()
    whole = states.hidden_states[feature]
    heads = config.vision_config.num_attention_heads
    layers = {
        number: QueriesAndKeys(*(seen[name].unflatten(-1, (heads, -1)) for name in ("q", "k")))
        for number, seen in caught.items()
    }
    return TowerOutput(whole[:, 1:], model.model.multi_modal_projector, whole[:, 0], layers)


@torch.no_grad()
def entering_tokens(
    model: Any,
    pixels: torch.Tensor,
    profile: Profile,
    keep: int,
    scores: torch.Tensor | None = None,
    seen_before: MutableMapping[int, TowerOutput] | None = None,
) -> list[torch.Tensor]:
    """Visual tokens of each image that enter the decoder ``[K, d]`` each, by the profile's reducer before it.

    Args:
        model: a Hugging Face LLaVA.
        pixels: processed images ``[B, 3, h, w]``.
        profile: the profile.
        keep: K.
        scores: ``[N]``, whose highest are kept in place of the selector's choice.
        seen_before: what the tower gave of each image, by its number: taken from there, and put there where missing.
            It spares a caller who asks about the same images at several K the tower's pass.
    """
    assert profile.before is not None
    assert profile.selector is not None
    selector = profile.selector
    if isinstance(selector, Resize) and keep < image_size(profile):
        smaller = shrink_pixels(pixels, math.isqrt(keep), model.config.vision_config.patch_size)
        return list(tower_output(model, smaller, selector).projected)
    # One image at a time: the reference has no batches.
    found = []
    known = {} if seen_before is None else seen_before
    for number, image in enumerate(pixels):
        if (seen := known.get(number)) is None:
            seen = known[number] = tower_output(model, image[None], selector)
        params = profile.params_of(profile.before)
        if scores is None or keep >= seen.total:
            found.append(preselect(seen, selector, params, keep)[0])
        else:
            found.append(combine(seen, Choice(top_k(scores[None], keep)), selector, params)[0])
    return found
