"""How vLLM groups the KV cache of segments: arithmetic only, so that a plan can print what padding will cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KVGroups:
    """How vLLM cuts the layers of segments into KV groups, all of ``size`` layers, from one pool of blocks.

    Attributes:
        size: layers per group, hence layers per block.
        count: groups of each segment.
        padding: layers that each segment lacks to fill its groups; their memory is lost.
    """

    size: int
    count: tuple[int, ...]
    padding: tuple[int, ...]


def kv_groups(segment_layers: Sequence[int]) -> KVGroups:
    """Groups of segments with ``segment_layers`` layers, by vLLM's rule for unequal KV specs.

    The size is the layers of the smallest segment, or of the largest where that is below 1.5 times the smallest.
    """
    smallest, largest = min(segment_layers), max(segment_layers)
    size = largest if largest < 1.5 * smallest else smallest
    count = tuple(math.ceil(layers / size) for layers in segment_layers)
    return KVGroups(size, count, tuple(n * size - layers for n, layers in zip(count, segment_layers, strict=True)))
