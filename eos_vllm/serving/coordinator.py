"""One decision per request for all KV groups: what a hit covers, whether a step needs blocks, what can be cached.

vLLM's coordinators ask every group for every request and step, compare block counts of groups to find a hit, and know
hashes but no request. Groups here hold unlike numbers of tokens, and decode steps seldom need a block in any of them.
"""

import math
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.kv_cache import SegmentManager
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.prefix_cache import RequestKeys


class SegmentCoordinator(KVCacheCoordinator):
    """Put in the place of vLLM's by :func:`adopt`, for vLLM offers no choice of coordinator."""

    single_type_managers: tuple[SegmentManager, ...]  # type: ignore[assignment]
    plans: dict[str, RequestPlan]
    keys: dict[str, RequestKeys]
    looked_up: RequestKeys | None
    scheduling: bool
    counters: Counters | None
    _groups: dict[int, list[int]]
    _room: dict[str, int]
    _next_to_cache: dict[str, float]
    _nothing: tuple[tuple[KVCacheBlock, ...], ...]

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """As vLLM's; 0 at once while the blocks that a running request holds have room."""
        if num_tokens <= self._room.get(request_id, 0):
            return 0
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As vLLM's; counts the hit once for a request that is let in, however often it was looked up."""
        super().allocate_new_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, *args, **kwargs
        )
        if self.counters is not None and any(new_computed_blocks):
            plan = self.plans.get(request_id)
            for segment in self._groups:
                tokens = num_local_computed_tokens
                self.counters.add("hit", segment, plan.segment_length(segment, tokens) if plan else tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; remembers how many tokens fit until any group needs a block."""
        if num_tokens <= self._room.get(request_id, 0):
            return self._nothing
        blocks = super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        plan = self.plans.get(request_id)
        if plan is None or num_tokens >= plan.images_end:
            self._room[request_id] = min(
                len(m.req_to_blocks[request_id]) * m.block_size + (plan.removed[m.kv_cache_spec.segment] if plan else 0)
                for m in self.single_type_managers
            )
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Caches what this step fills; nothing is asked again until a block fills."""
        if num_computed_tokens < self._next_to_cache.get(request.request_id, 0):
            return
        for manager in self.single_type_managers:
            if manager.enable_caching:
                manager.cache_blocks(request, num_computed_tokens)
        if num_computed_tokens >= request.num_prompt_tokens:
            size = self.scheduler_block_size
            limit = self.keys[request.request_id].limit if request.request_id in self.keys else math.inf
            done = num_computed_tokens > limit
            self._next_to_cache[request.request_id] = math.inf if done else (num_computed_tokens // size + 1) * size

    def remove_skipped_blocks(self, *_: Any, **__: Any) -> None:
        """Nothing: full attention skips no token."""

    def free(self, request_id: str) -> None:
        """As vLLM's."""
        self._forget(request_id)
        super().free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's."""
        self._forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def _forget(self, request_id: str) -> None:
        self._room.pop(request_id, None)
        self._next_to_cache.pop(request_id, None)
        for manager in self.single_type_managers:
            manager.leave_marks(request_id, written=not self.scheduling)

    def get_num_cacheable_tokens(self, num_computed_tokens: int, kv_cache_group_id: int) -> int:
        """All of them: each manager knows its blocks."""
        return num_computed_tokens

    def find_longest_cache_hit(
        self, block_hashes: Any, max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """The longest position at which every segment has all its blocks, in one pass: attention is full everywhere."""
        nothing: tuple[list[KVCacheBlock], ...] = tuple([] for _ in self.single_type_managers)
        keys, size = self.looked_up, self.scheduler_block_size
        if keys is None:
            return nothing, 0, 0
        limit = int(min(max_cache_hit_length, keys.limit))
        found = {s: self._leading_blocks(keys, s, ids, limit) for s, ids in self._groups.items()}
        ends = {*range(limit // size * size, 0, -size), *(mark for mark in keys.marks if mark <= limit)}
        for end in sorted(ends, reverse=True):
            lengths = {s: keys.length(s, end) for s in self._groups}
            if not keys.may_resume_at(end) or any(lengths[s] // size > len(found[s]) for s in found):
                continue
            tails: dict[int, Sequence[KVCacheBlock] | None] = {}
            if end % size:
                tails = {
                    s: self.block_pool.get_cached_block(keys.key(s, lengths[s]), ids)  # type: ignore[arg-type]
                    for s, ids in self._groups.items()
                }
                if not all(tails.values()):
                    continue
            hits = nothing
            for s, ids in self._groups.items():
                for n, group in enumerate(ids):
                    hits[group].extend(blocks[n] for blocks in found[s][: lengths[s] // size])
                    if tail := tails.get(s):
                        hits[group].append(tail[n])
            return hits, end, 0
        return nothing, 0, 0

    def _leading_blocks(self, keys: RequestKeys, segment: int, ids: list[int], limit: int) -> list[list[KVCacheBlock]]:
        size, blocks = self.scheduler_block_size, []
        for end in range(size, keys.length(segment, limit) + 1, size):
            cached = self.block_pool.get_cached_block(keys.key(segment, end), ids)  # type: ignore[arg-type]
            if cached is None:
                break
            blocks.append(cached)
        return blocks


def adopt(
    coordinator: KVCacheCoordinator, plans: dict[str, RequestPlan], keys: dict[str, RequestKeys]
) -> SegmentCoordinator:
    """Turns vLLM's coordinator, all of whose managers are segments', into a :class:`SegmentCoordinator`.

    Raises:
        RuntimeError: a KV group that is no segment's, or groups of unequal block sizes.
    """
    for manager in coordinator.single_type_managers:
        if not isinstance(manager, SegmentManager):
            raise RuntimeError(f"KV group {manager.kv_cache_group_id} is managed by {type(manager).__name__}")
        if manager.block_size != coordinator.scheduler_block_size:
            raise RuntimeError("KV groups of unequal block sizes cannot be reduced")
        manager.plans, manager.keys = plans, keys
    coordinator.__class__ = SegmentCoordinator
    assert isinstance(coordinator, SegmentCoordinator)
    coordinator.plans, coordinator.keys, coordinator.looked_up, coordinator.scheduling = plans, keys, None, False
    coordinator._room, coordinator._next_to_cache, coordinator.counters = {}, {}, None
    coordinator._nothing = tuple(() for _ in coordinator.single_type_managers)
    coordinator._groups = {}
    for i, manager in enumerate(coordinator.single_type_managers):
        coordinator._groups.setdefault(manager.kv_cache_spec.segment, []).append(i)
    return coordinator
