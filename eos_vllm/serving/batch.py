"""What the worker knows of the batch at hand, and the lengths that each segment sees of it.

One integer per request and segment, the tokens that are gone, turns vLLM's metadata into the segment's. A decode step
costs one subtraction per segment; the integers are sent to the device only when the batch changes. What depends on the
segment alone is computed once per step, however many KV groups the segment was cut into.

Every step is proved as it goes: metadata of a step that was not announced, metadata that is built twice or for other
lengths, and images whose reducing pass did not run end the engine. Answers would be wrong, and look fine.
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from eos_vllm.core.layout import BatchLayout, Entry, build_layout
from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import Profile
from eos_vllm.serving.trace import Recorder


class StepEntry(NamedTuple):
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
        requests: request of each token ``[tokens]``.
        positions: index of each token among the tokens that the segment caches of its request ``[tokens]``.
    """

    metadata: CommonAttentionMetadata
    requests: torch.Tensor
    positions: torch.Tensor
    _places: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that the segment caches in this step, padding left out."""
        return self.requests.shape[0]

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
            known = self._places[width, block_size] = torch.add(block, self.requests, alpha=width), offset
        return known


class BatchState:
    """Shared by runner hook, metadata builders and model of one worker; lives as long as the model."""

    _removed_device: torch.Tensor
    _seq_lens: torch.Tensor
    _arange: torch.Tensor

    def __init__(self, profile: Profile, max_requests: int, device: torch.device) -> None:
        self.profile = profile
        self.num_segments = profile.num_segments
        self.max_requests = max_requests
        self.device = device
        self.entries: list[Entry] = []
        self.layout: BatchLayout | None = None
        self.prefills_images = False
        self.is_real = False
        self.step = 0
        self._tokens = 0
        self._reduction_due = False
        self._removed = np.zeros((self.num_segments, max_requests), np.int32)
        self._query_removed = np.zeros((self.num_segments, max_requests), np.int32)
        self._images_end = np.zeros(max_requests, np.int64)
        self._requests: list[Any] = []
        self._settled = False
        self.block_tables: dict[str, torch.Tensor] = {}  # of this step, by layer name
        self._geometry: dict[int, SegmentGeometry] = {}
        # Nothing is gone in any segment, and no graph reads buffers by address: all segments share what is built.
        self.uniform = False
        self.built: Any = None  # metadata of such a step
        self.workspace: torch.Tensor | None = None  # of FlashInfer's builders
        self.recorder: Recorder | None = None  # of traces, where the server has any

    def allocate(self) -> None:
        """Makes the tensors that captured graphs read by address.

        Called where the KV cache is made, not with the model: what is made with the model is taken for weights, and
        lost when the engine sleeps at level 2.
        """
        shape = (self.num_segments, self.max_requests)
        self._removed_device = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._seq_lens = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._arange = torch.arange(self.max_requests, dtype=torch.int64, device=self.device)
        self._settled = False

    def goes_on(self, requests: Sequence[Any], computed: np.ndarray, tokens: int) -> bool:
        """Whether a step holds the very requests of the last one, their images behind them; then it has begun.

        Args:
            requests: an object for each row, the same one as long as the request lives.
            computed: tokens of each row computed before.
            tokens: of the step.
        """
        count = len(requests)
        if (
            not self._settled
            or count != len(self._requests)
            or not all(map(operator.is_, requests, self._requests))
            or (computed[:count] < self._images_end[:count]).any()
        ):
            return False
        self._next_step(tokens, is_real=True)
        return True

    def _next_step(self, tokens: int, is_real: bool) -> None:
        if self._reduction_due:
            raise RuntimeError(
                "eos: the last step prefilled images, but their reduction did not run: something replayed or replaced "
                "the model's forward pass. Its answers would be wrong"
            )
        self.step += 1
        self._geometry.clear()
        self.built = None
        self._tokens, self.is_real = tokens, is_real

    def begin(self, entries: Sequence[StepEntry] | None, requests: Sequence[Any] = ()) -> None:
        """Takes over the requests of a step before any metadata is built; None for vLLM's dummy runs.

        Args:
            entries: the requests of the step, in batch order.
            requests: as in :meth:`goes_on`, where the next step may be asked so.

        Raises:
            RuntimeError: the reduction of the last step did not run.
            ValueError: an image comes without its window, which the scheduler must never let happen.
        """
        self._next_step(sum(entry.scheduled for entry in entries or ()), entries is not None)
        entries = entries or ()
        self._requests = list(requests)
        self._settled = bool(requests) and all(e.plan is None or e.computed >= e.plan.images_end for e in entries)
        self._images_end[: len(entries)] = [0 if e.plan is None else e.plan.images_end for e in entries]
        self._removed[:] = 0
        self._query_removed[:] = 0
        self.prefills_images = False
        for i, entry in enumerate(entries):
            if entry.plan is None:
                continue
            if entry.computed >= entry.plan.images_end:
                self._removed[:, i] = entry.plan.removed
                continue
            end = entry.computed + entry.scheduled
            before, after = (
                [n - entry.plan.segment_length(s, n) for s in range(self.num_segments)] for n in (entry.computed, end)
            )
            self._removed[:, i] = after
            self._query_removed[:, i] = np.subtract(after, before)
            self.prefills_images |= bool(entry.plan.images_in(entry.computed, end))
        self.take_images(entries if self.prefills_images else ())
        self.uniform = self.device.type == "cpu" and not self._removed.any() and not self.prefills_images
        self._removed_device.copy_(_to_device(self._removed, self.device))

    def take_images(self, entries: Sequence[StepEntry]) -> None:
        """Lays out the requests of a step that prefills images for the reducing pass; none for other steps."""
        self.entries = [Entry(entry.scheduled, entry.plan, entry.computed) for entry in entries]
        self.layout = None
        if self.recorder is not None and self.recorder.step:
            self.recorder.lay_out(entries)
        if entries:
            self.layout = build_layout(self.entries, self.num_segments, self.profile.importance.queries, self.device)

    def geometry(self, segment: int, common: CommonAttentionMetadata) -> SegmentGeometry:
        """The segment's view of vLLM's metadata; computed once per step and segment, whatever its KV groups."""
        segment = 0 if self.uniform else segment
        if (known := self._geometry.get(segment)) is None:
            if not self._geometry:
                self._check(common)
            known = self._geometry[segment] = self._build(segment, common)
        return known

    def _check(self, common: CommonAttentionMetadata) -> None:
        if self.is_real and (built := int(common.query_start_loc_cpu[-1])) != self._tokens:
            raise RuntimeError(f"eos: metadata is built for {built} tokens, {self._tokens} were announced for the step")
        self._reduction_due = self.is_real and self.prefills_images

    def reduction_ran(self) -> None:
        """The model's reducing pass has run for the step at hand."""
        self._reduction_due = False

    def geometry_of(self, segment: int) -> SegmentGeometry:
        """What :meth:`geometry` built earlier in this step."""
        return self._geometry[0 if self.uniform else segment]

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
        if metadata.max_query_len == 1 and int(metadata.query_start_loc_cpu[min(tokens, n)]) == tokens:
            # Decode: a token a request; requests without one, such as padded ones, are all behind.
            return requests[:tokens], metadata.seq_lens[:tokens].long() - 1
        starts = metadata.query_start_loc.long()
        rows = torch.repeat_interleave(requests, starts.diff(), output_size=tokens)
        first = metadata.seq_lens.long() - starts[1:]
        return rows, first[rows] + torch.arange(tokens, device=self.device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
