"""Attention layers that see their segment's tokens: spec, metadata and KV write of converted layers.

The pattern is vLLM's own for cross attention: a backend class derived from the one that vLLM chose, whose builder
rewrites the metadata and whose implementation writes the KV cache with the builder's slots.
"""

import copy
import functools
from dataclasses import fields
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from eos_vllm.serving.batch import BatchState
from eos_vllm.serving.contract import ATTENTION_BACKENDS
from eos_vllm.serving.kv_cache import SegmentSpec

PADDING_SLOT = -1


class SegmentAttention(Attention):
    """An ``Attention`` that was converted in place; constructing a second one of the name is refused by vLLM."""

    eos_segment: int
    eos_batch: BatchState

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The spec of vLLM's layer, with the segment in it."""
        spec = super().get_kv_cache_spec(vllm_config)
        if type(spec) is not FullAttentionSpec:
            raise RuntimeError(f"layer {self.layer_name} has KV spec {spec}; only full attention can be reduced")
        return SegmentSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init}, segment=self.eos_segment)


def convert(layer: Attention, segment: int, batch: BatchState) -> None:
    """Turns a layer into one of segment ``segment``: spec, backend and implementation."""
    layer.__class__ = SegmentAttention
    assert isinstance(layer, SegmentAttention)
    layer.eos_segment = segment
    layer.eos_batch = batch
    layer.attn_backend = segment_backend(layer.attn_backend)
    layer.impl.__class__ = layer.attn_backend.get_impl_cls()  # type: ignore[assignment]


@functools.cache
def segment_backend(underlying: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend of all segments over the one that vLLM chose for the platform."""
    if (name := underlying.get_name()) not in ATTENTION_BACKENDS:
        raise RuntimeError(
            f"eos: attention backend {name} is none that segments were written for; choose one of "
            f"{', '.join(ATTENTION_BACKENDS)} with --attention-backend, or leave out --eos-profile"
        )
    underlying_builder: Any = underlying.get_builder_cls()
    underlying_impl: Any = underlying.get_impl_cls()
    is_cpu = underlying.get_name() == "CPU_ATTN"

    class SegmentBuilder(underlying_builder):
        """Builds the underlying metadata from the segment's lengths, and its slots."""

        # A segment may own several KV groups, which differ in their blocks only. On CPUs they share metadata; a GPU's
        # builders fill buffers of their own, which captured graphs read by address, so each has to build.
        supports_update_block_table = is_cpu

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            self.eos_layers = list(layer_names)
            self.eos_step = 0
            self.eos_segment: int = layer.eos_segment
            self.eos_batch: BatchState = layer.eos_batch
            if name == "FLASHINFER":
                _share_workspace(self, self.eos_batch)
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.eos_slots = torch.full((tokens,), PADDING_SLOT, dtype=torch.int64, device=device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            if self.eos_step == self.eos_batch.step:
                raise RuntimeError(
                    "eos: attention metadata is built again without a new step being announced: vLLM's model runner "
                    "does not call what the reduction hooks, and lengths of an earlier step would be used"
                )
            self.eos_step = self.eos_batch.step
            if self.eos_batch.built is not None:
                return self.update_block_table(self.eos_batch.built, common_attn_metadata.block_table_tensor, None)
            common = copy.copy(self.eos_batch.geometry(self.eos_segment, common_attn_metadata).metadata)
            common.block_table_tensor = common_attn_metadata.block_table_tensor
            common.slot_mapping = slots = self.eos_slot_mapping(common.block_table_tensor)
            metadata = super().build(common_prefix_len, common, *args, **kwargs)
            metadata.slot_mapping = slots
            if self.eos_batch.uniform:
                self.eos_batch.built = metadata
            return metadata

        def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor | None) -> Any:
            """For further KV groups of a segment; vLLM's slot mapping knows nothing of it, so ours replaces it."""
            shared = copy.copy(metadata)
            shared.block_table, shared.slot_mapping = blk_table, self.eos_slot_mapping(blk_table)
            return shared

        def eos_slot_mapping(self, block_table: torch.Tensor) -> torch.Tensor:
            """Slots of this step's tokens in a persistent buffer, padding at the end; ``[num_actual_tokens]``."""
            geometry = self.eos_batch.geometry_of(self.eos_segment)
            if self.eos_batch.prefills_images:
                self.eos_batch.block_tables.update(dict.fromkeys(self.eos_layers, block_table))
            size, block = geometry.metadata.num_actual_tokens, self.kv_cache_spec.block_size
            slots = self.eos_slots[:size]
            tokens = geometry.num_tokens if self.eos_batch.is_real else 0
            if tokens < size:
                slots[tokens:] = PADDING_SLOT
            if tokens:
                entry, offset = geometry.places(block_table.shape[1], block)
                blocks = block_table.reshape(-1).index_select(0, entry)
                torch.add(offset, blocks, alpha=block, out=slots[:tokens])
            return slots

    class SegmentImpl(underlying_impl):
        """Writes the KV cache itself, with the segment's slots."""

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            if attn_metadata is not None and not underlying.forward_includes_kv_cache_update:
                slots = attn_metadata.slot_mapping
                tokens = slots.shape[0]
                self.do_kv_cache_update(layer, key[:tokens], value[:tokens], kv_cache, slots)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    return subclass_attention_backend_with_overrides(
        name_prefix="EosSegment_",
        attention_backend_cls=underlying,
        overrides={
            "get_builder_cls": staticmethod(lambda: SegmentBuilder),
            "get_impl_cls": staticmethod(lambda: SegmentImpl),
            "forward_includes_kv_cache_update": True,
        },
    )


def _share_workspace(builder: Any, batch: BatchState) -> None:
    """One FlashInfer workspace for all builders, as vLLM's V2 runner has it: some 400 MiB each, behind KV sizing."""
    if batch.workspace is None:
        batch.workspace = builder._get_workspace_buffer()
    builder.set_workspace_buffer(batch.workspace)


def builds_for_segments(layer: Attention) -> bool:
    """Whether vLLM takes our builder and implementation for this layer."""
    backend = layer.get_attn_backend()
    return backend.__name__.startswith("EosSegment_") and type(layer.impl) is backend.get_impl_cls()
