"""A KV cache that really shrinks: one KV group per segment, with as many blocks as the plan says (design 5.2)."""

import copy
from dataclasses import dataclass
from typing import Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from eos_vllm.core.plan import RequestPlan


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(FullAttentionSpec):
    """KV cache of the layers of one segment; segments never share a KV group, for they cache different tokens."""

    segment: int

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
        self.plans: dict[str, RequestPlan] = {}
        self.blocks_held = 0

    def tokens_of(self, request_id: str, num_tokens: int) -> int:
        """Tokens that this segment caches of the first ``num_tokens`` tokens of a request."""
        plan = self.plans.get(request_id)
        return num_tokens if plan is None else plan.segment_length(self.kv_cache_spec.segment, num_tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        """Blocks that the segment's own token count lacks; without prefix caching nothing else matters.

        Asked for every KV group, request and decode step, and therefore short.
        """
        needed = cdiv(self.tokens_of(request_id, num_tokens), self.block_size)
        return max(needed - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM's, of the segment's own token count."""
        if not self.get_num_blocks_to_allocate(request_id, num_tokens):
            return []
        blocks = super().allocate_new_blocks(request_id, self.tokens_of(request_id, num_tokens), num_tokens_main_model)
        self.blocks_held += len(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; keeps the count of blocks held."""
        blocks = super().pop_blocks_for_free(request_id)
        self.blocks_held -= len(blocks)
        return blocks


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


# At import, because a spec that arrives pickled in the engine core must find its manager there.
register_specs()
