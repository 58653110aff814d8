"""What the worker knows of the batch at hand, and the lengths that each segment sees of it.

One integer per request and segment, the tokens that are gone, turns vLLM's metadata into the segment's. A decode step
costs one subtraction per segment; the integers are sent to the device only when the batch changes. What depends on the
segment alone is computed once per step, however many KV groups the segment was cut into.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from eos_vllm.core.layout import Row
from eos_vllm.core.plan import RequestPlan


class BatchRow(NamedTuple):
    """One request in the step: its plan (None where it reduces nothing), tokens computed before, tokens scheduled.

    A tuple, for one is made per request and decode step.
    """

    request_id: str
    plan: RequestPlan | None
    computed: int
    scheduled: int


@dataclass
class SegmentGeometry:
    """Metadata of one segment in this step, and where its tokens go within their requests.

    Attributes:
        metadata: vLLM's metadata with the segment's lengths (block table and slots are still another group's).
        rows: request of each token ``[tokens]``.
        positions: index of each token among the tokens that the segment caches of its request ``[tokens]``.
    """

    metadata: CommonAttentionMetadata
    rows: torch.Tensor
    positions: torch.Tensor
    _places: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that the segment caches in this step, padding left out."""
        return self.rows.shape[0]

    def places(self, width: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the tokens go, before it is known which blocks are the requests'; the same for a segment's KV groups.

        Args:
            width: blocks per row of the block table.
            block_size: tokens per block.

        Returns:
            Index of each token's entry in the flattened block table, and its offset in the block, both ``[tokens]``.
        """
        if (known := self._places.get((width, block_size))) is None:
            block = self.positions // block_size
            offset = torch.sub(self.positions, block, alpha=block_size)
            known = self._places[width, block_size] = torch.add(block, self.rows, alpha=width), offset
        return known


class BatchState:
    """Shared by runner hook, metadata builders and model of one worker; lives as long as the model."""

    def __init__(self, num_segments: int, max_requests: int, device: torch.device) -> None:
        self.num_segments = num_segments
        self.device = device
        self.rows: list[Row] = []
        self.prefills_images = False
        self.is_real = False
        self._removed = np.zeros((num_segments, max_requests), np.int32)
        self._query_removed = np.zeros((num_segments, max_requests), np.int32)
        self._plans: list[RequestPlan | None] = []
        self._settled = False
        self.block_tables: dict[str, torch.Tensor] = {}  # of this step, by layer name
        # Persistent, for captured graphs read them by address.
        self._removed_device = torch.zeros((num_segments, max_requests), dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros((num_segments, max_requests), dtype=torch.int32, device=device)
        self._arange = torch.arange(max_requests, dtype=torch.int64, device=device)
        self._geometry: dict[int, SegmentGeometry] = {}

    def begin(self, rows: Sequence[BatchRow] | None) -> None:
        """Takes over the rows of a step before any metadata is built; None for vLLM's dummy runs.

        Raises:
            ValueError: an image comes without its window, which the scheduler must never let happen.
        """
        self._geometry.clear()
        self.is_real = rows is not None
        rows = rows or ()
        plans = [row.plan for row in rows]
        settled = all(row.plan is None or row.computed >= row.plan.images_end for row in rows)
        if settled and self._settled and plans == self._plans:
            return
        self._plans, self._settled = plans, settled
        self._removed[:] = 0
        self._query_removed[:] = 0
        self.prefills_images = False
        for i, row in enumerate(rows):
            if row.plan is None:
                continue
            if row.computed >= row.plan.images_end:
                self._removed[:, i] = row.plan.removed
                continue
            end = row.computed + row.scheduled
            before, after = (
                [n - row.plan.segment_length(s, n) for s in range(self.num_segments)] for n in (row.computed, end)
            )
            self._removed[:, i] = after
            self._query_removed[:, i] = np.subtract(after, before)
            self.prefills_images |= bool(row.plan.images_in(row.computed, end))
        self.rows = [Row(r.scheduled, r.plan, r.computed) for r in rows] if self.prefills_images else []
        self._removed_device.copy_(_to_device(self._removed, self.device))

    def geometry(self, segment: int, common: CommonAttentionMetadata) -> SegmentGeometry:
        """The segment's view of vLLM's metadata; computed once per step and segment, whatever its KV groups."""
        if (known := self._geometry.get(segment)) is None:
            known = self._geometry[segment] = self._build(segment, common)
        return known

    def geometry_of(self, segment: int) -> SegmentGeometry:
        """What :meth:`geometry` built earlier in this step."""
        return self._geometry[segment]

    def _build(self, segment: int, common: CommonAttentionMetadata) -> SegmentGeometry:
        n = common.num_reqs
        removed = self._removed[segment, :n]
        seq_lens = torch.sub(common.seq_lens, self._removed_device[segment, :n], out=self._seq_lens[segment, :n])
        metadata = copy.copy(common)
        metadata.seq_lens = seq_lens
        metadata._num_computed_tokens_cache = metadata._token_to_req_indices_cache = None
        if common.seq_lens_cpu_upper_bound is not None:
            upper = common.seq_lens_cpu_upper_bound.numpy() - removed
            metadata.seq_lens_cpu_upper_bound = torch.from_numpy(upper)
            if self.is_real:
                metadata.max_seq_len = int(upper.max())
        if self.prefills_images and self._query_removed[segment].any():
            lengths = common.query_start_loc_cpu.diff().numpy() - self._query_removed[segment, :n]
            starts = np.zeros(n + 1, np.int32)
            np.cumsum(lengths, out=starts[1:])
            metadata.query_start_loc_cpu = torch.from_numpy(starts)
            metadata.query_start_loc = _to_device(starts, self.device)
            metadata.num_actual_tokens = int(starts[-1])
            metadata.max_query_len = int(lengths.max())
        return SegmentGeometry(metadata, *self._token_positions(metadata))

    def _token_positions(self, metadata: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        n, tokens = metadata.num_reqs, int(metadata.query_start_loc_cpu[metadata.num_reqs])
        requests = self._arange[:n]
        if metadata.max_query_len == 1 and tokens <= n:
            # Decode: a token a request; padded requests, all behind, have none.
            return requests[:tokens], metadata.seq_lens[:tokens].long() - 1
        starts = metadata.query_start_loc.long()
        rows = torch.repeat_interleave(requests, starts.diff(), output_size=tokens)
        first = metadata.seq_lens.long() - starts[1:]
        return rows, first[rows] + torch.arange(tokens, device=self.device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
