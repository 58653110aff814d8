"""Where tokens stand, before and after each reducer, in a ragged batch: host integers only, uploaded once per step.

Rows are tokens of the step at hand. A request's earlier tokens are cached; where a reducer needs their keys, these
follow the keys of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import QueryRule


@dataclass(frozen=True)
class Entry:
    """One request's tokens in a forward pass, behind ``computed`` earlier ones whose KV is cached."""

    num_tokens: int
    plan: RequestPlan | None = None
    computed: int = 0


@dataclass(frozen=True)
class ImageGroup:
    """Images of a batch that go from ``total`` to ``keep`` tokens at one reducer; B of them, T queries (padded
    within the group).

    Attributes:
        total: visual tokens of each before the reducer, N.
        keep: visual tokens of each after it, K.
        longest: keys of the longest of their requests, L.
        images: their indices among all images of the batch ``[B]``.
        start: unreduced position of each image's first token ``[B]``.
        first_row: row of each request's key 0, were all of its keys in this step ``[B]``.
        cached: keys of earlier steps of each request ``[B]``; None where none has any.
        first_cached: place of the first of these in the key tensor ``[B]``.
        first_visual: row of each image's first visual token ``[B]``.
        first_kept: row of its first kept token after the reducer ``[B]``.
        query_rows: rows of the query tokens ``[B, T]``.
        visible: leading keys of the own request that each query may see ``[B, T]``.
        keeps_last: 1 where the last visual token must stay because the prompt ends in it ``[B]``; None if nowhere.
        text: how many of each image's tokens are text, which stays; which ones, :attr:`BatchLayout.image_text` says.
        numbers: as ``images``, on the host.
    """

    total: int
    keep: int
    longest: int
    images: torch.Tensor
    start: torch.Tensor
    first_row: torch.Tensor
    cached: torch.Tensor | None
    first_cached: torch.Tensor | None
    first_visual: torch.Tensor
    first_kept: torch.Tensor
    query_rows: torch.Tensor
    visible: torch.Tensor
    keeps_last: torch.Tensor | None
    text: int = 0
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReducerStep:
    """What one reducer does to a batch.

    Attributes:
        source: row that each row after the reducer comes from (those of kept tokens are filled in later).
        groups: the images that it reduces.
        cached: requests whose keys of earlier steps are needed, as ``(request, number of keys)``; these keys follow
            those of the step in this order.
        tokens_in: visual tokens of all images of the batch before the reducer.
        tokens_kept: and after it.
    """

    source: torch.Tensor
    groups: tuple[ImageGroup, ...]
    cached: tuple[tuple[int, int], ...]
    tokens_in: int
    tokens_kept: int


@dataclass(frozen=True)
class BatchLayout:
    """Index tensors of a whole forward pass.

    Attributes:
        steps: one per reducer.
        num_images: images that the pass reduces.
        text_rows: rows of the text that asks about each image ``[images, T]``, padded with row 0.
        text_mask: which of them are real ``[images, T]`` bool.
        visual_groups: for each number of visual tokens: indices among the images ``[B]``, and rows ``[B, N]``.
        image_text: which rows are text within an image ``[tokens]`` bool; None where no image has any.
        segment_lengths: tokens of each request in each segment ``[segments][requests]``.
    """

    steps: tuple[ReducerStep, ...]
    num_images: int
    text_rows: torch.Tensor
    text_mask: torch.Tensor
    visual_groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    segment_lengths: np.ndarray
    image_text: torch.Tensor | None = None


_Slot = int


class _Upload:
    """Collects integer arrays and sends them to the device in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arrays: list[np.ndarray] = []
        self.tensors: list[torch.Tensor] = []

    def add(self, values: np.ndarray | Sequence[int]) -> _Slot:
        self.arrays.append(np.asarray(values, dtype=np.int64))
        return len(self.arrays) - 1

    def send(self) -> None:
        flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in self.arrays]))
        if self.device.type == "cuda":
            flat = flat.pin_memory()
        pieces = flat.to(self.device, non_blocking=True).split([array.size for array in self.arrays])
        self.tensors = [
            piece if array.ndim == 1 else piece.view(array.shape)
            for piece, array in zip(pieces, self.arrays, strict=True)
        ]

    def view(self, slot: _Slot) -> torch.Tensor:
        return self.tensors[slot]


@dataclass(frozen=True)
class _Image:
    """An image of the batch: its request, that request's plan, and its place there."""

    request: int
    plan: RequestPlan
    index: int

    def query_runs(self, segment: int, first_row: int, last_only: bool) -> list[tuple[int, int]]:
        """Runs of rows of the queries in a segment; ``first_row`` is the row of the request's token 0."""
        plan, i = self.plan, self.index
        if plan.image_queries:
            end = first_row + plan.segment_start(i, segment) + plan.kept[i][segment]
            return [(end - min(plan.image_queries, plan.kept[i][segment]), end)]
        runs = plan.query_runs(i)
        if not runs:  # no text follows: the window's last token asks
            end = first_row + plan.segment_length(segment, plan.windows[i])
            return [(end - 1, end)]
        if last_only:
            _, end, before = runs[-1]
            runs = ((end - 1, end, before),)
        return [(a - plan.lost[n][segment] + first_row, b - plan.lost[n][segment] + first_row) for a, b, n in runs]


def build_layout(entries: Sequence[Entry], num_segments: int, rule: QueryRule, device: torch.device) -> BatchLayout:
    """Lays out a batch that holds at least one image to reduce.

    Args:
        entries: the requests in batch order; an image is in a step with its whole window.
        num_segments: reducers plus one.
        rule: query rule; ``last_text`` needs only one query per image.
        device: where the tensors go.

    Returns:
        The layout; nothing in it depends on weights or scores.

    Raises:
        ValueError: a step holds an image without its window.
    """
    computed = np.array([entry.computed for entry in entries])
    cached = np.tile(computed, (num_segments, 1))
    lengths = np.tile(np.array([entry.num_tokens for entry in entries]), (num_segments, 1))
    images: list[_Image] = []
    # Few requests differ in what is gone of them: each kind is looked up, not each request.
    kinds: dict[tuple[int, ...], int] = {(0,) * num_segments: 0}
    gone = [0] * len(entries)
    for r, entry in enumerate(entries):
        if (plan := entry.plan) is None:
            continue
        if entry.computed >= plan.images_end:  # a decode step, or text behind the images: nothing of it goes
            gone[r] = kinds.setdefault(plan.removed, len(kinds))
            continue
        end = entry.computed + entry.num_tokens
        if (
            entry.computed <= plan.spans[0].start and end >= plan.windows[-1]
        ):  # all of its images, and nothing in between
            lengths[:, r] -= plan.removed
            images.extend(_Image(r, plan, i) for i in range(len(plan.spans)))
            continue
        for s in range(1, num_segments):
            cached[s, r] = plan.segment_length(s, entry.computed)
            lengths[s, r] = plan.segment_length(s, end) - cached[s, r]
        images.extend(_Image(r, plan, i) for i in plan.images_in(entry.computed, end))
    cached -= np.array(list(kinds)).T[:, gone]
    starts = np.concatenate([np.zeros((num_segments, 1), np.int64), lengths.cumsum(axis=1)], axis=1)
    # Row of each request's token 0, were it in this step.
    origins = starts[:, :-1] - cached
    upload = _Upload(device)
    table = _Images(images, rule == "last_text", origins)
    queries, counts = table.queries(0)
    text = upload.add(queries)
    mask = upload.add(np.arange(queries.shape[1]) < counts[:, None])
    by_length: dict[int, list[int]] = {}
    for n, length in enumerate((table.kept[0] - table.text).tolist()):
        by_length.setdefault(length, []).append(n)
    visual = [(upload.add(ns), upload.add(table.visual_rows(total, ns))) for total, ns in by_length.items()]
    image_text = upload.add(table.text_places(int(starts[0, -1]))) if table.text.any() else None
    ends = cached + lengths
    drafts = [_StepDraft(table, segment, cached, ends, starts, upload) for segment in range(num_segments - 1)]
    upload.send()
    return BatchLayout(
        steps=tuple(draft.finish(upload) for draft in drafts),
        num_images=len(images),
        text_rows=upload.view(text),
        text_mask=upload.view(mask).bool(),
        visual_groups=tuple((upload.view(ns), upload.view(rows)) for ns, rows in visual),
        segment_lengths=lengths,
        image_text=None if image_text is None else upload.view(image_text).bool(),
    )


def _table(runs: Sequence[Sequence[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each image's runs, 0 behind them ``[images, most]``, and how many there are ``[images]``."""
    counts = np.array([sum(end - start for start, end in own) for own in runs])
    width = int(counts.max())
    if all(len(own) == 1 for own in runs):
        table = np.array([own[0][0] for own in runs])[:, None] + np.arange(width)
        table[np.arange(width) >= counts[:, None]] = 0
        return table, counts
    table = np.zeros((len(runs), width), np.int64)
    for row, own in zip(table, runs, strict=True):
        rows = np.concatenate([np.arange(start, end) for start, end in own])
        row[: len(rows)] = rows
    return table, counts


# Indexing by it makes no copy, which is what most batches need: images of one count.
ALL = slice(None)


class _Images:
    """The images of a batch as arrays, one column for each; rows are segments where there are several.

    Attributes:
        requests: their requests.
        starts: unreduced position of their first token.
        keeps_last: 1 where the prompt ends in it.
        kept: tokens left of it in each segment.
        text: how many of them are text.
        origins: row of the request's token 0 in each segment.
        firsts: row of the first visual token in each segment.
    """

    def __init__(self, images: list[_Image], last_only: bool, origins: np.ndarray) -> None:
        self.images, self.last_only = images, last_only
        self.requests = np.array([image.request for image in images])
        self.starts = np.array([image.plan.spans[image.index].start for image in images])
        self.keeps_last = np.array(
            [image.plan.last_token_is_visual and image.index == len(image.plan.spans) - 1 for image in images], np.int64
        )
        self.kept = np.array([image.plan.kept[image.index] for image in images]).T
        self.text = np.array([len(image.plan.spans[image.index].text) for image in images])
        self.origins = origins[:, self.requests]
        self.firsts = self.origins + self.starts - np.array([image.plan.lost[image.index] for image in images]).T
        # Queries that follow one another stand so in every segment, and only their first row differs.
        self.runs = [image.plan.query_runs(image.index) for image in images]
        self.plain = all(len(runs) == 1 for runs in self.runs) and not any(i.plan.image_queries for i in images)
        if self.plain:
            begins, stops, before = np.array([runs[0] for runs in self.runs]).T
            self._begins = np.where(last_only, stops - 1, begins)
            self._counts = stops - self._begins
            lost = np.array([i.plan.lost[n] for i, n in zip(images, before.tolist(), strict=True)]).T
            self._shift = self.origins - lost

    def visual_rows(self, total: int, which: list[int]) -> np.ndarray:
        """Rows of the visual tokens of images that have ``total`` of them ``[images, total]``, before any reducer."""
        if not self.text[which].any():
            return self.firsts[0, which, None] + np.arange(total)
        spans = (self.images[n].plan.spans[self.images[n].index] for n in which)
        places = [np.delete(np.arange(span.length), np.array(span.text, np.int64)) for span in spans]
        return self.firsts[0, which, None] + np.array(places)

    def text_places(self, tokens: int) -> np.ndarray:
        """Which of ``tokens`` rows are text within an image, before any reducer ``[tokens]``."""
        found = np.zeros(tokens, np.int64)
        for n, image in enumerate(self.images):
            found[self.firsts[0, n] + np.array(image.plan.spans[image.index].text, np.int64)] = 1
        return found

    def queries(self, segment: int, which: "slice | np.ndarray" = ALL) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the queries of some images in a segment, 0 behind them ``[images, most]``; how many there are."""
        if not self.plain:
            origin, numbers = self.origins[segment].tolist(), np.arange(len(self.images))[which].tolist()
            return _table([self.images[n].query_runs(segment, origin[n], self.last_only) for n in numbers])
        counts = self._counts[which]
        place = np.arange(int(counts.max()))
        rows = (self._begins[which] + self._shift[segment, which])[:, None] + place
        rows[place >= counts[:, None]] = 0
        return rows, counts


class _StepDraft:
    """One reducer's arrays on their way to the device."""

    def __init__(
        self,
        images: _Images,
        segment: int,
        cached: np.ndarray,
        ends: np.ndarray,
        starts: np.ndarray,
        upload: _Upload,
    ) -> None:
        after = segment + 1
        totals, keeps, firsts = images.kept[segment], images.kept[after], images.firsts[after]
        text = int(images.text.sum())
        self.tokens_in, self.tokens_kept = int(totals.sum()) - text, int(keeps.sum()) - text
        # Rows move up by what the images in front of them lost; where an image stood, the gap opens.
        moves = np.ones(int(starts[after, -1]) + 1, np.int64)
        moves[0] = 0
        np.add.at(moves, firsts + keeps, totals - keeps)
        self.source = upload.add(moves.cumsum()[:-1])
        by_counts: dict[tuple[int, int, int], list[int]] = {}
        for n, counts in enumerate(zip(totals.tolist(), keeps.tolist(), images.text.tolist(), strict=True)):
            if counts[1] < counts[0]:
                by_counts.setdefault(counts, []).append(n)
        scored = (
            members for (_, keep, text), members in by_counts.items() if keep > text
        )  # a withdrawal reads no keys
        reduced = sorted({int(images.requests[n]) for members in scored for n in members})
        self.cached = tuple((r, int(cached[segment, r])) for r in reduced if cached[segment, r])
        places, behind = {}, int(starts[segment, -1])
        for r, count in self.cached:
            places[r], behind = behind, behind + count
        self.groups: list[tuple[int, int, int, int, list[int], list[_Slot | None]]] = []
        for (total, keep, text), numbers in by_counts.items():
            members = ALL if len(numbers) == len(totals) else np.array(numbers)
            requests, origin = images.requests[members], images.origins[segment, members]
            rows, queries = images.queries(segment, members)
            visible = np.where(np.arange(rows.shape[1]) < queries[:, None], rows - origin[:, None] + 1, 1)
            last = images.keeps_last[members]
            takes_over = [places.get(r, 0) for r in requests.tolist()] if places else []
            self.groups.append(
                (
                    total,
                    keep,
                    text,
                    int(ends[segment, requests].max()),
                    numbers,
                    [
                        upload.add(numbers),
                        upload.add(images.starts[members]),
                        upload.add(origin),
                        upload.add(cached[segment, requests]) if any(takes_over) else None,
                        upload.add(takes_over) if any(takes_over) else None,
                        upload.add(images.firsts[segment, members]),
                        upload.add(images.firsts[after, members]),
                        upload.add(rows),
                        upload.add(visible),
                        upload.add(last) if last.any() else None,
                    ],
                )
            )

    def finish(self, upload: _Upload) -> ReducerStep:
        """The step, once the arrays are on the device."""
        groups = []
        for total, keep, text, longest, numbers, slots in self.groups:
            members, start, row, cached, place, visual, kept, queries, visible, last = (
                None if slot is None else upload.view(slot) for slot in slots
            )
            groups.append(
                ImageGroup(
                    *(total, keep, longest, members, start, row, cached, place, visual),  # type: ignore[arg-type]
                    *(kept, queries, visible, last, text, tuple(numbers)),  # type: ignore[arg-type]
                )
            )
        return ReducerStep(upload.view(self.source), tuple(groups), self.cached, self.tokens_in, self.tokens_kept)
