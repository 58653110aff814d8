"""A KV cache that really shrinks: one KV group per segment, with as many blocks as the plan says."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.prefix_cache import RequestKeys


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(FullAttentionSpec):
    """KV cache of the layers of one segment; segments never share a KV group, for they cache different tokens."""

    segment: int

    @property
    def uses_slot_mapping(self) -> bool:
        """No: segments compute their own slots, and the V2 runner then fills its own with padding."""
        return False

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Joins equal specs; others raise AssertionError, which is how vLLM learns that they must stay apart."""
        if any(spec != specs[0] for spec in specs[1:]):
            raise AssertionError("layers of different segments cannot share a KV group")
        return copy.deepcopy(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """vLLM puts layers of a uniform type into one group; only those of one segment are."""
        return all(isinstance(spec, SegmentSpec) and spec.segment == self.segment for spec in kv_cache_specs.values())


class SegmentManager(FullAttentionManager):
    """Allocates for the tokens that its segment caches instead of all tokens of the request."""

    kv_cache_spec: SegmentSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, RequestPlan] | None = None  # set by whoever plans
        self.keys: dict[str, RequestKeys] = {}
        self._fresh_marks: dict[str, list[tuple[KVCacheBlock, Any]]] = {}
        self._marked: dict[str, set[int]] = {}
        self.blocks_held = 0  # by requests; a shared block counts for each

    def tokens_of(self, request_id: str, num_tokens: int) -> int:
        """Tokens that this segment caches of the first ``num_tokens`` tokens of a request."""
        if self.plans is None:
            raise RuntimeError("eos: the scheduler plans nothing: something replaced scheduler_cls")
        plan = self.plans.get(request_id)
        return num_tokens if plan is None else plan.segment_length(self.kv_cache_spec.segment, num_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As vLLM's, of the segment's own token counts."""
        return super().get_num_blocks_to_allocate(
            request_id,
            self.tokens_of(request_id, num_tokens),
            new_computed_blocks,
            self.tokens_of(request_id, total_computed_tokens),
            self.tokens_of(request_id, num_local_computed_tokens),
            *args,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """As vLLM's, of the segment's own token count."""
        tokens = self.tokens_of(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(request_id, new_computed_blocks, tokens, num_external_computed_tokens)
        self.blocks_held += len(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM's, of the segment's own token count."""
        before = len(self.req_to_blocks[request_id])
        blocks = super().allocate_new_blocks(request_id, self.tokens_of(request_id, num_tokens), num_tokens_main_model)
        self.blocks_held += len(self.req_to_blocks[request_id]) - before  # a block that is copied replaces another
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; keeps the count of blocks held."""
        blocks = super().pop_blocks_for_free(request_id)
        self.blocks_held -= len(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *_: Any, **__: Any) -> None:
        """Caches full blocks under the segment's keys, and the blocks of marks under a second one.

        A mark's block is copied in front of the step that takes it over, so it must have been written in an earlier
        one: it can be found from the next step on.
        """
        name, segment = request.request_id, self.kv_cache_spec.segment
        keys, blocks = self.keys[name], self.req_to_blocks[name]
        num_tokens = int(min(num_tokens, keys.limit))
        done, full = self.num_cached_block.get(name, 0), self.tokens_of(name, num_tokens) // self.block_size
        for i in range(done, full):
            self._insert(blocks[i], self._group_key(keys, segment, (i + 1) * self.block_size))
        self.num_cached_block[name] = max(done, full)
        for mark in keys.marks:
            marked = self._marked.setdefault(name, set())
            if mark <= num_tokens and mark not in marked:
                marked.add(mark)
                length = self.tokens_of(name, mark)
                fresh = blocks[length // self.block_size], self._group_key(keys, segment, length)
                self._fresh_marks.setdefault(name, []).append(fresh)

    def new_step_starts(self) -> None:
        """The step that wrote the fresh marks has gone to the worker, which works in order."""
        for name in list(self._fresh_marks):
            self._publish_marks(name)

    def leave_marks(self, request_id: str, written: bool) -> None:
        """Of a request that goes: its fresh marks stay if the step that writes them has been sent to the worker."""
        if written:
            self._publish_marks(request_id)
        self._fresh_marks.pop(request_id, None)
        self._marked.pop(request_id, None)

    def _publish_marks(self, request_id: str) -> None:
        for block, key in self._fresh_marks.pop(request_id, ()):
            self._insert(block, key)

    def _group_key(self, keys: RequestKeys, segment: int, length: int) -> Any:
        return make_block_hash_with_group_id(keys.key(segment, length), self.kv_cache_group_id)  # type: ignore[arg-type]

    def _insert(self, block: KVCacheBlock, key: Any) -> None:
        # vLLM's cache_full_blocks would take the first name from a block that already carries a mark.
        self.block_pool._insert_block_hash(key, block, num_tokens=0)


def register_specs() -> None:
    """Registers :class:`SegmentSpec`. vLLM's own specs come first: its registry only checks that it is not empty."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SegmentSpec, SegmentManager, uniform_type_base_spec=SegmentSpec)


def segments_of_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Segment of each KV group.

    Raises:
        RuntimeError: a group that is no segment's; the reduction would not be in place.
    """
    segments = []
    for group in kv_cache_config.kv_cache_groups:
        if not isinstance(group.kv_cache_spec, SegmentSpec):
            raise RuntimeError(f"KV group of layers {group.layer_names} has spec {group.kv_cache_spec}, no SegmentSpec")
        segments.append(group.kv_cache_spec.segment)
    return segments


def planned_blocks(kv_cache_config: KVCacheConfig, plan: RequestPlan | None, num_tokens: int) -> list[int]:
    """Blocks per KV group that a request of ``num_tokens`` tokens must hold by its plan."""
    return [
        cdiv(plan.segment_length(segment, num_tokens) if plan else num_tokens, group.kv_cache_spec.block_size)
        for segment, group in zip(segments_of_groups(kv_cache_config), kv_cache_config.kv_cache_groups, strict=True)
    ]


def prefilled(
    step: SchedulerOutput,
    requests: Mapping[str, Request],
    plans: Mapping[str, RequestPlan],
    kv_cache_config: KVCacheConfig,
) -> tuple[float, bool] | None:
    """KV blocks of prompts that a step prefills, and whether others decode in it; None where a part holds no image.

    A prompt that is prefilled in part, for it is chunked or begins with a cache hit, counts in proportion.
    """
    scheduled = step.num_scheduled_tokens
    if step.total_num_scheduled_tokens == len(scheduled):
        return 0.0, True
    blocks, decoding = 0.0, False
    for name, tokens in scheduled.items():
        request = requests[name]
        if request.num_computed_tokens - tokens >= request.num_prompt_tokens:
            decoding = True
        elif not _holds_image(request, request.num_computed_tokens - tokens, request.num_computed_tokens):
            return None
        else:
            whole = planned_blocks(kv_cache_config, plans.get(name), request.num_prompt_tokens)
            blocks += sum(whole) * tokens / request.num_prompt_tokens
    return blocks, decoding


def _holds_image(request: Request, start: int, end: int) -> bool:
    """Whether tokens ``[start, end)`` of its prompt hold the beginning of an image; others cost next to nothing."""
    return any(start <= feature.mm_position.offset < end for feature in request.mm_features)


# At import, because a spec that arrives pickled in the engine core must find its manager there.
register_specs()
