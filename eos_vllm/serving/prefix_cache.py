"""Names of the KV blocks of reduced prompts, for vLLM's prefix cache.

A compact block of segment s is named by what decides its content: the exact prompt up to the end of the last window
that reaches into it, and the reductions before that (places, windows, counts up to s). In segment 0 and in front of the
first image this is vLLM's own hash. Since whole blocks are removed (``rounded_count``), a boundary between unreduced
blocks is one between compact blocks wherever it is not within an image. The end of an image or a window is none: the
block that it falls into gets a second name, a mark, and is taken over by copy (vLLM's copy-on-write of partial blocks).
"""

import math
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.request import Request

from eos_vllm.core.plan import RequestPlan


class RequestKeys:
    """Keys of one request's blocks, by segment; each is computed once."""

    def __init__(
        self,
        request: Request,
        plan: RequestPlan | None,
        block_size: int,
        hasher: Callable[[Any], bytes],
        whole_blocks: bool,
    ) -> None:
        """``whole_blocks`` says that counts are rounded to blocks; without, a reduced prompt is shared up to its first
        image only."""
        self.request, self.plan, self.block_size, self.hasher = request, plan, block_size, hasher
        self.limit = math.inf if plan is None or whole_blocks else plan.spans[0].start
        ends = (*plan.windows, *(span.end for span in plan.spans)) if plan and whole_blocks else ()
        self.marks = tuple(sorted({end for end in ends if end % block_size}))
        self._prefixes: dict[int, bytes] = {}
        self._reductions: dict[tuple[int, int], bytes] = {}
        self._keys: dict[tuple[int, int], bytes] = {}

    def length(self, segment: int, position: int) -> int:
        """Tokens that the segment caches of the first ``position``."""
        return self.plan.segment_length(segment, position) if self.plan else position

    def may_resume_at(self, position: int) -> bool:
        """Whether a hit may end there."""
        return position <= self.limit and (self.plan is None or self.plan.may_resume_at(position))

    def key(self, segment: int, length: int) -> bytes:
        """Key of the block that the segment's first ``length`` tokens fill, to its end or up to a mark."""
        plan = self.plan
        if plan is None or segment == 0 or length <= plan.spans[0].start:
            return self._prefix(length) if length % self.block_size == 0 else self._marked(segment, length, length)
        if (key := self._keys.get((segment, length))) is None:
            key = self._keys[segment, length] = self._marked(segment, length, plan.settled_by(segment, length))
        return key

    def _marked(self, segment: int, length: int, settled: int) -> bytes:
        return self.hasher((self._prefix(settled), "eos", length, self._reduced(segment, settled)))

    def _reduced(self, segment: int, position: int) -> bytes:
        if self.plan is None or segment == 0:
            return b""
        seen = sum(span.start < position for span in self.plan.spans)
        if (digest := self._reductions.get((segment, seen))) is None:
            digest = self.hasher(self.plan.reductions(segment, position))
            self._reductions[segment, seen] = digest
        return digest

    def _prefix(self, position: int) -> bytes:
        """Hash of exactly the first ``position`` tokens, images included."""
        full, rest = divmod(position, self.block_size)
        hashes = self.request.block_hashes
        if not rest:
            return hashes[full - 1]
        if (known := self._prefixes.get(position)) is None:
            start = position - rest
            extra, _ = generate_block_hash_extra_keys(self.request, start, position, 0)
            parent = hashes[full - 1] if full else None
            known = hash_block_tokens(self.hasher, parent, self.request.all_token_ids[start:position], extra)
            self._prefixes[position] = known
        return known
