"""The line that a server prints at start: reducers, kept counts, KV bytes per image, requests that fit."""

from typing import Any

from eos_vllm.core.budget import measures, segment_tokens
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile
from eos_vllm.serving.kv_cache import planned_blocks, segments_of_groups

_TEXT_TOKENS = 88


def startup_report(planner: Planner, vllm_config: Any, kv_cache_config: Any) -> str:
    """Plain words for the engineer who sizes the machine.

    Args:
        planner: the server's planner.
        vllm_config: for names.
        kv_cache_config: what vLLM made of the segments.

    Returns:
        One line.
    """
    profile, counts = planner.profile, planner.counts()
    visual, entering, layers = planner.visual_tokens, planner.image_tokens(), profile.segment_layers()
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    token_bytes = spec.page_size_bytes // spec.block_size
    stock = visual * sum(layers) * token_bytes
    ours = (
        sum(n * tokens for n, tokens in zip(layers, segment_tokens(profile, counts, visual), strict=True)) * token_bytes
    )
    tokens = min(entering + _TEXT_TOKENS, vllm_config.model_config.max_model_len)
    stock_tokens = min(visual + _TEXT_TOKENS, vllm_config.model_config.max_model_len)
    span = ImageSpan(0, min(entering, tokens))
    plan = planner.plan(planner.trial_prompt(tokens, span), [span])
    usable = kv_cache_config.num_blocks - 1
    fit = usable // sum(planned_blocks(kv_cache_config, plan, tokens))
    groups = kv_cache_config.kv_cache_groups
    width = max(len(group.layer_names) for group in groups)
    fit_stock = usable * width // sum(layers) // -(-stock_tokens // spec.block_size)
    padding = sum(width - len(group.layer_names) for group in groups)
    segments = segments_of_groups(kv_cache_config)
    return (
        f"{short_report(planner)}; "
        f"visual KV per image {ours / 2**20:.2f} MiB instead of {stock / 2**20:.2f} MiB; "
        f"{fit} requests with an image and {_TEXT_TOKENS} text tokens fit into the KV cache instead of {fit_stock}; "
        f"{len(groups)} KV groups {[segments.count(s) for s in range(profile.num_segments)]} by segment, "
        f"{padding} padding layers"
    )


def short_report(planner: Planner) -> str:
    """What a profile keeps of an image, and what that costs."""
    profile, counts = planner.profile, planner.counts()
    per = "per image" if profile.model.visual_tokens is not None else "of the largest image, others alike"
    return (
        f"profile {profile.name!r} reduces {places(profile)}: {planner.visual_tokens} -> {list(counts)} visual "
        f"tokens {per} (budget {planner.budget}: {measures(profile, counts, planner.visual_tokens)})"
    )


def places(profile: Profile) -> str:
    """Where a profile reduces."""
    parts = [] if profile.selector is None else [f"before the decoder ({profile.selector.rule})"]
    if profile.layers:
        parts.append(f"after layers {list(profile.layers)}")
    return " and ".join(parts)
