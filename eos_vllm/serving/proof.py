"""Proof that a reduction is in place, before a worker or an engine takes its first request.

Another project once lost accuracy silently because what it had patched was missing in the worker's process.
"""

from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.kv_cache_interface import KVCacheConfig

from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.serving.kv_cache import SegmentManager, planned_blocks, segments_of_groups
from eos_vllm.serving.watch import layer_problem

_TRIAL = "eos-trial"


def trial_plan(planner: Planner, max_model_len: int) -> tuple[RequestPlan, int]:
    """A request with one image, as long as fits, and the number of its tokens."""
    visual = planner.image_tokens()
    tokens = min(max_model_len, visual + 64)
    span = ImageSpan(min(5, max(tokens - visual, 0)), min(visual, tokens))
    return planner.plan(planner.trial_prompt(tokens, span), [span]), tokens


def prove_worker(reduction: Any, kv_cache_config: KVCacheConfig, max_model_len: int) -> None:
    """Checks, after the KV cache is set up, that every layer is in its segment and blocks come out as planned.

    Raises:
        RuntimeError: it is not so; vLLM then ends the worker, and the server with it.
    """
    profile = reduction.profile
    names = {layer.layer_name: i for i, layer in reduction.attention.items()}
    if reduction.stages == 1 and len(names) != profile.model.num_decoder_layers:
        raise RuntimeError(f"eos: {len(names)} attention layers, the profile is for {profile.model.num_decoder_layers}")
    for segment, group in zip(segments_of_groups(kv_cache_config), kv_cache_config.kv_cache_groups, strict=True):
        for name in group.layer_names:
            index = names.pop(name)
            if segment != (want := profile.segment_of_layer(index)):
                raise RuntimeError(f"eos: layer {name} caches for segment {segment}, its place is segment {want}")
            if problem := layer_problem(reduction.attention[index], want):
                raise RuntimeError(f"eos: {problem}")
    if names:
        raise RuntimeError(f"eos: layers {sorted(names)} have no KV cache")
    pool = BlockPool(
        num_gpu_blocks=sum(_trial_blocks(kv_cache_config, reduction.planner, max_model_len)) + 1,
        enable_caching=False,
        hash_block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
    )
    managers = [
        SegmentManager(
            group.kv_cache_spec,
            block_pool=pool,
            enable_caching=False,
            kv_cache_group_id=i,
            scheduler_block_size=group.kv_cache_spec.block_size,
        )
        for i, group in enumerate(kv_cache_config.kv_cache_groups)
    ]
    _allocate_and_compare(managers, kv_cache_config, reduction.planner, max_model_len)


def prove_allocation(
    kv_cache_config: KVCacheConfig, planner: Planner, max_model_len: int, coordinator: KVCacheCoordinator
) -> None:
    """Allocates a trial request with the engine's own managers, compares with the plan, and frees it.

    Raises:
        RuntimeError: other block counts than planned, or a pool that is not empty afterwards.
    """
    managers = [m for m in coordinator.single_type_managers if isinstance(m, SegmentManager)]
    free = coordinator.block_pool.get_num_free_blocks()
    _allocate_and_compare(managers, kv_cache_config, planner, max_model_len)
    if coordinator.block_pool.get_num_free_blocks() != free:
        raise RuntimeError(f"eos: {free} KV blocks were free before the trial request, now it is fewer")


def _trial_blocks(kv_cache_config: KVCacheConfig, planner: Planner, max_model_len: int) -> list[int]:
    return planned_blocks(kv_cache_config, *trial_plan(planner, max_model_len))


def _allocate_and_compare(
    managers: list[SegmentManager], kv_cache_config: KVCacheConfig, planner: Planner, max_model_len: int
) -> None:
    plan, tokens = trial_plan(planner, max_model_len)
    want = planned_blocks(kv_cache_config, plan, tokens)
    plans = [manager.plans for manager in managers]
    for manager in managers:
        manager.plans = {_TRIAL: plan}
    got: list[int] | None = None
    try:
        promised = [m.get_num_blocks_to_allocate(_TRIAL, tokens, [], 0, 0, tokens) for m in managers]
        if promised == want:
            got = [len(m.allocate_new_blocks(_TRIAL, tokens, tokens)) for m in managers]
    finally:
        for manager, before in zip(managers, plans, strict=True):
            manager.free(_TRIAL)
            manager.plans = before
    if got != want:
        raise RuntimeError(f"eos: KV blocks per group: planned {want}, promised {promised}, allocated {got}")
