"""What a planned prompt costs per decoder layer: tokens, KV cache and FLOPs of the language model.

FLOPs are counted as the field does for LLaVA: twice the multiply-accumulates of a layer's matrices and of attention
over the full square of tokens. Vision tower, embeddings, output head, softmax and the reducers' own work (each below
1 % of a layer of LLaVA-1.5-7B) are left out: the speed-up that follows from a FLOPs ratio is a ceiling, no forecast.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from eos_vllm.analysis.kv_groups import kv_groups
from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import RequestPlan

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1}


class Geometry(Protocol):
    """Sizes that a cost depends on; :class:`eos_vllm.models.geometry.ModelGeometry` has them."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_decoder_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def visual_tokens(self) -> int | None: ...


def layer_flops(geometry: Geometry, tokens: int) -> int:
    """FLOPs of one decoder layer that prefills ``tokens`` tokens: two per multiply-accumulate.

    With d hidden, m intermediate, H query heads, Hk key heads of size D, the multiply-accumulates of n tokens are
    2ndHD (query, output) + 2ndHkD (key, value) + 2n²HD (scores, values; the full square, although half of it is
    masked) + 3ndm (gated MLP). For HD = HkD = d that is the usual 4nd² + 2n²d + 3ndm.
    """
    d, queries = geometry.hidden_size, geometry.num_attention_heads * geometry.head_dim
    keys = geometry.num_kv_heads * geometry.head_dim
    projections = 2 * tokens * d * (queries + keys)
    attention = 2 * tokens * tokens * queries
    mlp = 3 * tokens * d * geometry.intermediate_size
    return 2 * (projections + attention + mlp)


def flops_crossover(geometry: Geometry) -> int:
    """Tokens at which the square of attention costs as many FLOPs as a layer's matrices (``model.flops_crossover``)."""
    queries = geometry.num_attention_heads * geometry.head_dim
    matrices = layer_flops(geometry, 1) - 4 * queries
    return max(1, round(matrices / (4 * queries)))


def kv_bytes_per_token(geometry: Geometry, dtype: str = "float16") -> int:
    """Bytes that one decoder layer caches for one token: a key and a value for each of its key heads.

    Raises:
        SettingError: ``dtype`` is none of :data:`DTYPE_BYTES`.
    """
    if dtype not in DTYPE_BYTES:
        raise SettingError("dtype", dtype, "unknown type of the KV cache", f"give one of {', '.join(DTYPE_BYTES)}")
    return 2 * geometry.num_kv_heads * geometry.head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class SegmentCost:
    """A run of decoder layers that see the same tokens.

    Attributes:
        first_layer: first decoder layer, counted from 0.
        last_layer: last one, included; a reducer works after it, but for the last segment.
        visual_tokens: visual tokens that each layer sees and caches, over all images.
        tokens: the same with text.
        kv_bytes: KV cache of each layer in bytes, no rounding to blocks.
        flops: prefill FLOPs of each layer.
        kv_groups: vLLM's KV groups of the segment.
        padding_layers: layers that fill up its groups.
        blocks: KV blocks of the whole segment, each group rounded up on its own.
    """

    first_layer: int
    last_layer: int
    visual_tokens: int
    tokens: int
    kv_bytes: int
    flops: int
    kv_groups: int
    padding_layers: int
    blocks: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True)
class PromptCost:
    """Cost of one prompt over all decoder layers. Bytes are of one request, over all tensor-parallel ranks together.

    Attributes:
        segments: the layers, in order.
        block_bytes: bytes of one KV block, which holds ``block_size`` tokens of as many layers as a group has.
        kv_bytes_per_token: bytes of one token in one layer.
    """

    segments: tuple[SegmentCost, ...]
    block_bytes: int
    kv_bytes_per_token: int

    @property
    def layer_visual_tokens(self) -> tuple[int, ...]:
        """Visual tokens that each decoder layer caches."""
        return tuple(s.visual_tokens for s in self.segments for _ in range(s.layers))

    @property
    def layer_tokens(self) -> tuple[int, ...]:
        """Tokens that each decoder layer caches, text included."""
        return tuple(s.tokens for s in self.segments for _ in range(s.layers))

    @property
    def layer_flops(self) -> tuple[int, ...]:
        """Prefill FLOPs of each decoder layer."""
        return tuple(s.flops for s in self.segments for _ in range(s.layers))

    @property
    def flops(self) -> int:
        """Prefill FLOPs of all decoder layers."""
        return sum(self.layer_flops)

    @property
    def kv_bytes(self) -> int:
        """KV cache of the prompt, not rounded up to blocks."""
        return sum(self.layer_tokens) * self.kv_bytes_per_token

    @property
    def visual_kv_bytes(self) -> int:
        """KV cache of its visual tokens alone."""
        return sum(self.layer_visual_tokens) * self.kv_bytes_per_token

    @property
    def blocks(self) -> int:
        """KV blocks of the prompt."""
        return sum(s.blocks for s in self.segments)

    @property
    def allocated_bytes(self) -> int:
        """KV memory that the prompt holds in vLLM: whole blocks, padding layers included."""
        return self.blocks * self.block_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data: segments, values of every layer, and totals."""
        return {
            "segments": [asdict(s) for s in self.segments],
            "layers": {
                "visual_tokens": list(self.layer_visual_tokens),
                "tokens": list(self.layer_tokens),
                "kv_bytes": [tokens * self.kv_bytes_per_token for tokens in self.layer_tokens],
                "flops": list(self.layer_flops),
            },
            "kv_bytes": self.kv_bytes,
            "visual_kv_bytes": self.visual_kv_bytes,
            "blocks": self.blocks,
            "block_bytes": self.block_bytes,
            "allocated_bytes": self.allocated_bytes,
            "flops": self.flops,
        }


def prompt_cost(
    geometry: Geometry,
    plan: RequestPlan,
    segment_layers: Sequence[int],
    dtype: str = "float16",
    block_size: int = 16,
) -> PromptCost:
    """Cost of one planned prompt.

    Args:
        geometry: sizes of the model.
        plan: the request's plan; one that reduces nothing (or holds no image) costs what stock does.
        segment_layers: decoder layers of each segment; ``(num_decoder_layers,)`` is stock vLLM with one KV group.
        dtype: type of the KV cache, a key of :data:`DTYPE_BYTES`.
        block_size: tokens per KV block.

    Raises:
        SettingError: unknown ``dtype``, or a block size below 1.
    """
    if block_size < 1:
        raise SettingError(
            "block-size", block_size, "a KV block holds at least one token", "give 16, or what vLLM uses"
        )
    token_bytes = kv_bytes_per_token(geometry, dtype)
    groups = kv_groups(segment_layers)
    text = plan.prompt_length - sum(span.length for span in plan.spans)
    ends = tuple(itertools.accumulate(segment_layers))
    segments = []
    for s, end in enumerate(ends):
        tokens = plan.segment_length(s, plan.prompt_length)
        segments.append(
            SegmentCost(
                first_layer=end - segment_layers[s],
                last_layer=end - 1,
                visual_tokens=tokens - text,
                tokens=tokens,
                kv_bytes=tokens * token_bytes,
                flops=layer_flops(geometry, tokens),
                kv_groups=groups.count[s],
                padding_layers=groups.padding[s],
                blocks=groups.count[s] * math.ceil(tokens / block_size),
            )
        )
    return PromptCost(tuple(segments), groups.size * block_size * token_bytes, token_bytes)
