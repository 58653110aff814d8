"""Where tokens stand, before and after each reducer, in a ragged batch: host integers only, uploaded once per step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import QueryRule


@dataclass(frozen=True)
class Row:
    """One request's tokens in a forward pass; ``plan`` is None where they pass unchanged (decode, text only)."""

    num_tokens: int
    plan: RequestPlan | None = None


@dataclass(frozen=True)
class ImageGroup:
    """Images of a batch that go from ``total`` to ``keep`` tokens at one reducer; B of them, T queries (padded
    within the group).

    Attributes:
        total: visual tokens of each before the reducer, N.
        keep: visual tokens of each after it, K.
        longest: tokens of the longest of their requests, L.
        images: their indices among all images of the batch ``[B]``.
        first_row: row at which each image's request begins ``[B]``.
        first_visual: row of each image's first visual token ``[B]``.
        first_kept: row of its first kept token after the reducer ``[B]``.
        query_rows: rows of the query tokens ``[B, T]``.
        visible: tokens of the own request that each query may see ``[B, T]``.
        keeps_last: 1 where the last visual token must stay because the prompt ends in it ``[B]``; None if nowhere.
    """

    total: int
    keep: int
    longest: int
    images: torch.Tensor
    first_row: torch.Tensor
    first_visual: torch.Tensor
    first_kept: torch.Tensor
    query_rows: torch.Tensor
    visible: torch.Tensor
    keeps_last: torch.Tensor | None


@dataclass(frozen=True)
class ReducerStep:
    """What one reducer does to a batch: ``source[j]`` is the row that row j comes from (kept ones filled in later).

    ``tokens_in`` and ``tokens_kept`` count the visual tokens of all images of the batch.
    """

    source: torch.Tensor
    groups: tuple[ImageGroup, ...]
    tokens_in: int
    tokens_kept: int


@dataclass(frozen=True)
class BatchLayout:
    """Index tensors of a whole forward pass.

    Attributes:
        steps: one per reducer.
        text_rows: rows of the text behind each image ``[images, T]``, padded with row 0.
        text_mask: which of them are real ``[images, T]`` bool.
        visual_groups: for each length of image: indices among the images, and first rows.
        segment_lengths: tokens of each row in each segment ``[segments][rows]``.
    """

    steps: tuple[ReducerStep, ...]
    text_rows: torch.Tensor
    text_mask: torch.Tensor
    visual_groups: tuple[tuple[int, torch.Tensor, torch.Tensor], ...]
    segment_lengths: np.ndarray


class _Upload:
    """Collects integer arrays and sends them to the device in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arrays: list[np.ndarray] = []
        self.size = 0

    def add(self, values: np.ndarray | Sequence[int]) -> tuple[int, tuple[int, ...]]:
        array = np.asarray(values, dtype=np.int64)
        slot = (self.size, array.shape)
        self.arrays.append(array.reshape(-1))
        self.size += array.size
        return slot

    def send(self) -> None:
        flat = torch.from_numpy(np.concatenate(self.arrays))
        if self.device.type == "cuda":
            flat = flat.pin_memory()
        self.flat = flat.to(self.device, non_blocking=True)

    def view(self, slot: tuple[int, tuple[int, ...]]) -> torch.Tensor:
        start, shape = slot
        return self.flat[start : start + int(np.prod(shape))].view(shape)


def build_layout(rows: Sequence[Row], num_segments: int, rule: QueryRule, device: torch.device) -> BatchLayout:
    """Lays out a batch that holds at least one image to reduce.

    Args:
        rows: the requests in batch order; a row with a plan holds its whole prompt (and perhaps generated tokens).
        num_segments: reducers plus one.
        rule: query rule; ``last_text`` needs only one query per image.
        device: where the tensors go.

    Returns:
        The layout; nothing in it depends on weights or scores.
    """
    lengths = np.array(
        [
            [r.plan.segment_length(s, r.num_tokens) if r.plan else r.num_tokens for r in rows]
            for s in range(num_segments)
        ]
    )
    starts = np.concatenate([np.zeros((num_segments, 1), np.int64), lengths.cumsum(axis=1)], axis=1)
    images = [(r, i) for r, row in enumerate(rows) if row.plan for i in range(len(row.plan.spans))]
    queries = [_plan(rows, r).query_positions(i) for r, i in images]
    if rule == "last_text":
        queries = [q[-1:] for q in queries]
    width = max(len(q) for q in queries)
    upload = _Upload(device)
    text = np.zeros((len(images), width), np.int64)
    mask = np.zeros((len(images), width), np.int64)
    for row_of_text, row_of_mask, positions, (r, _) in zip(text, mask, queries, images, strict=True):
        row_of_text[: len(positions)] = starts[0, r] + np.array(positions)
        row_of_mask[: len(positions)] = 1
    text_slot, mask_slot = upload.add(text), upload.add(mask)
    by_length: dict[int, list[int]] = {}
    for n, (r, i) in enumerate(images):
        by_length.setdefault(_plan(rows, r).spans[i].length, []).append(n)
    visual_slots = [
        (
            length,
            upload.add(ns),
            upload.add([starts[0, images[n][0]] + _plan(rows, images[n][0]).spans[images[n][1]].start for n in ns]),
        )
        for length, ns in by_length.items()
    ]
    drafts = [_draft_step(rows, images, queries, s, lengths, starts, upload) for s in range(num_segments - 1)]
    upload.send()
    return BatchLayout(
        steps=tuple(_finish_step(draft, upload) for draft in drafts),
        text_rows=upload.view(text_slot),
        text_mask=upload.view(mask_slot).bool(),
        visual_groups=tuple((length, upload.view(ns), upload.view(first)) for length, ns, first in visual_slots),
        segment_lengths=lengths,
    )


def _plan(rows: Sequence[Row], r: int) -> RequestPlan:
    plan = rows[r].plan
    assert plan is not None
    return plan


def _draft_step(
    rows: Sequence[Row],
    images: list[tuple[int, int]],
    queries: list[tuple[int, ...]],
    segment: int,
    lengths: np.ndarray,
    starts: np.ndarray,
    upload: _Upload,
) -> tuple[Any, list[Any], int, int]:
    after = segment + 1
    source = np.zeros(starts[after, -1], np.int64)
    for r, row in enumerate(rows):
        _fill_source(source, row, segment, int(starts[segment, r]), int(starts[after, r]))
    by_counts: dict[tuple[int, int], list[int]] = {}
    for n, (r, i) in enumerate(images):
        total, keep = _plan(rows, r).kept[i][segment : after + 1]
        if keep < total:
            by_counts.setdefault((total, keep), []).append(n)
    groups = []
    for (total, keep), members in by_counts.items():
        width = max(len(queries[n]) for n in members)
        query_rows = np.zeros((len(members), width), np.int64)
        visible = np.ones((len(members), width), np.int64)
        columns: list[tuple[int, int, int, int]] = []
        for b, n in enumerate(members):
            r, i = images[n]
            plan, first = _plan(rows, r), int(starts[segment, r])
            within = [plan.segment_length(segment, p + 1) for p in queries[n]]
            query_rows[b, : len(within)] = first + np.array(within) - 1
            visible[b, : len(within)] = within
            keeps_last = plan.last_token_is_visual and i == len(plan.spans) - 1
            first_kept = int(starts[after, r]) + plan.segment_start(i, after)
            columns.append((first, first + plan.segment_start(i, segment), first_kept, int(keeps_last)))
        first_row, first_visual, first_kept_all, last = zip(*columns, strict=True)
        longest = int(max(lengths[segment, images[n][0]] for n in members))
        slots = [upload.add(a) for a in (members, first_row, first_visual, first_kept_all, query_rows, visible)]
        groups.append((total, keep, longest, slots, upload.add(last) if any(last) else None))
    tokens_in, tokens_kept = (sum(_plan(rows, r).kept[i][s] for r, i in images) for s in (segment, after))
    return upload.add(source), groups, tokens_in, tokens_kept


def _fill_source(source: np.ndarray, row: Row, segment: int, first: int, first_after: int) -> None:
    """Rows that pass unchanged; those of reduced images are written on the device once the scores are known."""
    plan = row.plan
    if plan is None:
        source[first_after : first_after + row.num_tokens] = np.arange(first, first + row.num_tokens)
        return
    read, write = first, first_after
    for i in range(len(plan.spans)):
        here = first + plan.segment_start(i, segment)
        total, keep = plan.kept[i][segment], plan.kept[i][segment + 1]
        passing = here - read + (keep if keep == total else 0)
        source[write : write + passing] = np.arange(read, read + passing)
        write = first_after + plan.segment_start(i, segment + 1) + keep
        read = here + total
    tail = first + plan.segment_length(segment, row.num_tokens) - read
    source[write : write + tail] = np.arange(read, read + tail)


def _finish_step(draft: tuple[Any, list[Any], int, int], upload: _Upload) -> ReducerStep:
    source, groups, tokens_in, tokens_kept = draft
    finished = []
    for total, keep, longest, slots, last in groups:
        images, first_row, first_visual, first_kept, query_rows, visible = (upload.view(slot) for slot in slots)
        keeps_last = None if last is None else upload.view(last)
        finished.append(
            ImageGroup(
                total, keep, longest, images, first_row, first_visual, first_kept, query_rows, visible, keeps_last
            )
        )
    return ReducerStep(upload.view(source), tuple(finished), tokens_in, tokens_kept)
