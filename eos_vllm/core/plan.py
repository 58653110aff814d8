"""The reduction plan of one request: a pure function of profile, prompt, image spans, budget and KV block size.

The scheduler, each worker and the reference compute it for themselves and must agree; nothing here depends on
weights, on attention scores, or on the tokens that were generated.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from eos_vllm.core.budget import RetainBudget, Share, image_size, kept_counts, kept_of_selected, own_budget, tokens_of
from eos_vllm.core.profile import Profile, Withdrawal
from eos_vllm.core.windows import IMAGE_QUERIES, WindowRule

_REMEMBERED = 4096
# Visual tokens of a row in a trial's image.
_TRIAL_ROW = 24


@dataclass(frozen=True)
class ImageSpan:
    """Where one image stands in the unreduced prompt: ``[start, start + length)``.

    ``text`` holds those of its places, counted from its start and ascending, that are no visual tokens, such as the
    ends of rows in LLaVA-NeXT. They are neither scored nor dropped, and ask nothing.
    """

    start: int
    length: int
    text: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def visual(self) -> int:
        """Its visual tokens, N."""
        return self.length - len(self.text)


@dataclass(frozen=True)
class AtomicSpan:
    """Tokens ``[start, end)`` that one step must hold together: images, and the windows that score them."""

    start: int
    end: int


@dataclass(frozen=True)
class RequestPlan:
    """What is kept of one request.

    Attributes:
        prompt_length: tokens of the unreduced prompt, visual ones included.
        spans: the images, ascending and disjoint.
        kept: for each image the tokens left of it in each segment, its text included; ``kept[i][0]`` is its own length.
        windows: for each image the position behind the last token that may score it, ascending; the prompt's end where
            left out.
        image_queries: this many of an image's own last tokens score it, and no text; 0 where text does.
    """

    prompt_length: int
    spans: tuple[ImageSpan, ...]
    kept: tuple[tuple[int, ...], ...]
    windows: tuple[int, ...] = ()
    image_queries: int = 0

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.spans):
            object.__setattr__(self, "windows", (self.prompt_length,) * len(self.spans))

    @property
    def num_segments(self) -> int:
        return len(self.kept[0]) if self.kept else 1

    @cached_property
    def lost(self) -> tuple[tuple[int, ...], ...]:
        """``lost[n][s]``: tokens of the first n images that segment s lacks."""
        rows = [(0,) * self.num_segments]
        for kept in self.kept:
            rows.append(tuple(gone + kept[0] - k for gone, k in zip(rows[-1], kept, strict=True)))
        return tuple(rows)

    @cached_property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each segment lacks once all images are in: the number per segment that decode steps need."""
        return self.lost[-1] if self.kept else ()

    @cached_property
    def reduces(self) -> bool:
        """Whether any segment lacks any token."""
        return any(self.removed)

    @cached_property
    def images_end(self) -> int:
        """Position after the last visual token; 0 for text only."""
        return self.spans[-1].end if self.spans else 0

    @property
    def last_token_is_visual(self) -> bool:
        """Whether the prompt ends in a visual token, which is then kept for the sampler."""
        if not self.spans or self.images_end < self.prompt_length:
            return False
        last = self.spans[-1]
        return not last.text or last.text[-1] < last.length - 1

    def segment_length(self, segment: int, num_tokens: int) -> int:
        """Tokens that segment ``segment`` caches when the first ``num_tokens`` tokens of the request are in.

        Exact outside of images. Within one, where no step ends, it is the most that may be kept.
        """
        if not self.kept or segment == 0:
            return num_tokens
        if num_tokens >= self.images_end:
            return num_tokens - self.removed[segment]
        length = num_tokens
        for span, kept in zip(self.spans, self.kept, strict=True):
            seen = min(max(num_tokens - span.start, 0), span.length)
            length -= seen - min(seen, kept[segment])
        return length

    def segment_start(self, image: int, segment: int) -> int:
        """Index, within the request's tokens of segment ``segment``, of the first visual token of image ``image``."""
        return self.spans[image].start - self.lost[image][segment]

    def query_runs(self, image: int) -> tuple[tuple[int, int, int], ...]:
        """The text that image ``image`` is asked about: what stands behind it in its window, between later images.

        Returns:
            Runs ``(start, end, images in front of it)`` of unreduced positions; none where no text follows.
        """
        window, runs = self.windows[image], []
        for n in range(image, len(self.spans)):
            start = self.spans[n].end
            end = min(window, self.spans[n + 1].start) if n + 1 < len(self.spans) else window
            if start < end:
                runs.append((start, end, n + 1))
        return tuple(runs)

    def query_positions(self, image: int) -> tuple[int, ...]:
        """Unreduced positions of :meth:`query_runs`; the window's last token where there is no text."""
        text = tuple(p for start, end, _ in self.query_runs(image) for p in range(start, end))
        return text or (self.windows[image] - 1,)

    # What steps, chunks and caches need.

    @cached_property
    def atomic_spans(self) -> tuple[AtomicSpan, ...]:
        """What no prefill step may cut: each image with its window; those that overlap are one."""
        joined: list[AtomicSpan] = []
        for span, window in zip(self.spans, self.windows, strict=True):
            if joined and span.start < joined[-1].end:
                joined[-1] = AtomicSpan(joined[-1].start, max(joined[-1].end, window))
            else:
                joined.append(AtomicSpan(span.start, window))
        return tuple(joined)

    def images_in(self, computed: int, end: int) -> range:
        """Images that a step over the tokens ``[computed, end)`` reduces.

        Raises:
            ValueError: the step holds an image without its whole window.
        """
        if computed >= self.images_end:
            return range(0)
        inside = [i for i, span in enumerate(self.spans) if computed <= span.start < end]
        if any(self.windows[i] > end for i in inside) or not self.may_resume_at(computed):
            raise ValueError(
                f"tokens {computed} to {end - 1} cut an image {list(self.spans)} from its window {list(self.windows)}"
            )
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def may_resume_at(self, position: int) -> bool:
        """Whether KV of the first ``position`` tokens can be taken over: anywhere but within an image.

        Within a window it can, for what is kept is settled by then; the rest of the window is text like any other.
        """
        return not any(span.start < position < span.end for span in self.spans)

    def clip(self, computed: int, tokens: int) -> int:
        """As many of ``tokens`` behind ``computed`` as a step may take without cutting an image from its window."""
        if computed >= self.images_end:
            return tokens
        end = computed + tokens
        for span, window in zip(reversed(self.spans), reversed(self.windows), strict=True):
            if computed <= span.start < end < window:
                end = span.start
        return end - computed

    def settled_by(self, segment: int, length: int) -> int:
        """Position up to which the prompt decides what the first ``length`` tokens of segment ``segment`` are."""
        position = length
        for i, kept in enumerate(self.kept):
            start = self.segment_start(i, segment)
            if length <= start:
                break
            behind = length > start + kept[segment]
            position = length + self.lost[i + 1][segment] if behind else self.spans[i].end
        return max([position, *(w for span, w in zip(self.spans, self.windows, strict=True) if span.start < position)])

    def reductions(self, segment: int, position: int) -> tuple[Any, ...]:
        """All that, beside the tokens before ``position``, decides what segment ``segment`` holds of them."""
        return tuple(
            (span.start, window, kept[: segment + 1], window == self.prompt_length == span.end)
            for span, window, kept in zip(self.spans, self.windows, self.kept, strict=True)
            if span.start < position
        )


def rounded_count(total: int, keep: int, block: int, text: int = 0) -> int:
    """The count next to ``keep`` that removes whole KV blocks of ``block`` tokens; it is 0 only where ``keep`` is.

    ``text`` of these tokens stay whatever is kept, and all visual ones go only where ``keep`` says so.

    A compact block behind an image then covers exactly one block of unreduced tokens, which is what lets vLLM's prefix
    cache share it.
    """
    return total - min(int((total - keep) / block + 0.5), (total - text - (keep > text)) // block) * block


class Planner:
    """Plans requests for one profile; remembers the counts of each budget, for schedulers ask often."""

    def __init__(
        self,
        profile: Profile,
        budget: RetainBudget | None = None,
        block: int = 1,
        marker: Sequence[int] = (),
        example: int | None = None,
        image_token: int | None = None,
    ) -> None:
        """Plans by ``profile``.

        Args:
            profile: the operator profile.
            budget: replaces the profile's own where a request names none (``--eos-retain``).
            block: tokens per KV block, to which removed tokens are rounded; 1 takes counts as they are.
            marker: tokens of the chat template's generation prompt (:class:`~eos_vllm.core.windows.WindowRule`).
            example: visual tokens of an image that stands for all where the profile takes images of any size; reports
                and trial requests are about it.
            image_token: what stands for a visual token in a prompt, where other tokens within an image are text; None
                where all of an image is visual.
        """
        self.profile = profile
        self.budget = own_budget(profile) if budget is None else budget
        self.example = profile.model.visual_tokens or example
        self.image_token = image_token
        self.block = block
        self.rule = WindowRule(profile.window, tuple(marker))
        self.withdraws = isinstance(profile.reducers[-1], Withdrawal)
        self._counts: dict[tuple[RetainBudget, int], tuple[int, ...]] = {}
        self._by_profile: dict[tuple[RetainBudget, int], tuple[int, ...]] = {}

    @property
    def visual_tokens(self) -> int:
        """Of an image as the profile thinks of it, or of the example.

        Raises:
            ProfileError: images of any size, and no example.
        """
        return image_size(self.profile, self.example)

    def counts(self, budget: RetainBudget | None = None, total: int | None = None) -> tuple[int, ...]:
        """Visual tokens of one image left after each reducer, rounded to blocks.

        Args:
            budget: as the request names it.
            total: visual tokens of the image; the profile's or the example's where None.

        Raises:
            BudgetError: as :func:`eos_vllm.core.budget.kept_counts`.
        """
        total = self.visual_tokens if total is None else total
        if self.profile.before is None:
            return self._inside(budget, total)
        length = self.image_tokens(budget, total)
        return (length, *self._inside(budget, length))

    def image_tokens(self, budget: RetainBudget | None = None, total: int | None = None) -> int:
        """Tokens that one image has in the prompt: all, or what the reducer before the decoder leaves.

        Where reducers follow, that is whole KV blocks, so that they can remove whole blocks, and withdraw all of them.
        """
        total = self.visual_tokens if total is None else total
        if (selector := self.profile.selector) is None:
            return total
        keep = min(self._wanted(budget, total)[0], total)
        if self.profile.inside and keep < total:
            keep = min(max(int(keep / self.block + 0.5), 1) * self.block, total)
        return selector.count(keep, total)

    def _wanted(self, budget: RetainBudget | None, total: int) -> tuple[int, ...]:
        """Counts after each reducer as the profile says, of images as long as it thinks, if it thinks of one length."""
        size = self.profile.model.visual_tokens or total
        key = self.budget if budget is None else budget, size
        if (wanted := self._by_profile.get(key)) is None:
            if len(self._by_profile) >= _REMEMBERED:
                self._by_profile.clear()
            wanted = kept_counts(self.profile, *key)
            if tokens_of(*key) >= size and str(key[0]) not in self.profile.schedules:
                # No reduction, of images that are longer than the profile's either.
                most = size if isinstance(key[0], Share) else key[0]
                wanted = (most,) * len(wanted)
            self._by_profile[key] = wanted
        return wanted

    def _inside(self, budget: RetainBudget | None, length: int) -> tuple[int, ...]:
        """Tokens left after each reducer within the decoder of an image of ``length`` tokens in the prompt."""
        key = self.budget if budget is None else budget, length
        if (counts := self._counts.get(key)) is None:
            if len(self._counts) >= _REMEMBERED:
                self._counts.clear()
            wanted = self._unrounded(budget, length)
            counts = tuple(rounded_count(length, min(count, length), self.block) for count in wanted)
            self._counts[key] = counts
        return counts

    def _unrounded(self, budget: RetainBudget | None, length: int) -> tuple[int, ...]:
        if not self.profile.inside:
            return ()
        if self.profile.before is None:
            wanted = self._wanted(budget, length)
        elif self.profile.model.visual_tokens is None:
            wanted = kept_of_selected(self.profile, self.budget if budget is None else budget, length)
        else:
            wanted = self._wanted(budget, length)[1:]
        if self.profile.importance.debias is not None and length != self.profile.model.visual_tokens:
            return (length,) * len(wanted)  # what its places receive was never measured
        return wanted

    def _kept(self, budget: RetainBudget | None, span: ImageSpan) -> tuple[int, ...]:
        """Tokens left of an image after each reducer within the decoder; its text stays, and whole blocks go."""
        if not span.text:
            return self._inside(budget, span.length)
        text, counts = len(span.text), self._unrounded(budget, span.visual)
        kept = [min(count, span.visual) + text for count in counts]
        return tuple(rounded_count(span.length, keep, self.block, text) for keep in kept)

    def _with_text(self, prompt: Sequence[int], span: ImageSpan) -> ImageSpan:
        """The span, with those of its places that are text."""
        tokens = np.asarray(prompt[span.start : span.end])
        return ImageSpan(span.start, span.length, tuple(np.flatnonzero(tokens != self.image_token).tolist()))

    def trial_prompt(self, tokens: int, span: ImageSpan) -> list[int]:
        """A prompt of ``tokens`` tokens with one image, for trials before the first request."""
        prompt = [0] * tokens
        if self.image_token is not None:
            prompt[span.start : span.end] = [self.image_token] * (min(span.end, tokens) - span.start)
            for place in range(span.start + _TRIAL_ROW, min(span.end, tokens), _TRIAL_ROW + 1):
                prompt[place] = 0  # the end of a row
        return prompt

    def plan(
        self, prompt: Sequence[int] | int, spans: Sequence[ImageSpan], budget: RetainBudget | None = None
    ) -> RequestPlan:
        """Plans one request.

        Args:
            prompt: its tokens, each image with all visual tokens that enter the decoder. Their number does where the
                profile's window is the whole prompt.
            spans: where the images are; sorted here.
            budget: retain budget per image, as the request names it.

        Returns:
            The plan. An image shorter than a count keeps what it has.

        Raises:
            BudgetError: as :func:`eos_vllm.core.budget.kept_counts`.
            ValueError: spans that overlap or leave the prompt, or windows that need the prompt's tokens.
        """
        if isinstance(prompt, int):
            if self.rule.reads_tokens:
                raise ValueError("windows of kind turn need the tokens of the prompt, not their number")
            prompt = range(prompt)
        ordered = tuple(sorted(spans, key=lambda span: span.start))
        if not ordered:
            return RequestPlan(len(prompt), (), ())
        overlap = any(a.end > b.start for a, b in itertools.pairwise(ordered))
        if overlap or ordered[0].start < 0 or ordered[-1].end > len(prompt):
            raise ValueError(f"image spans {ordered} overlap or leave the prompt of {len(prompt)} tokens")
        if self.image_token is not None:
            ordered = tuple(self._with_text(prompt, span) for span in ordered)
        kept = tuple((span.length, *self._kept(budget, span)) for span in ordered)
        if ordered[-1].end == len(prompt) and kept[-1][-1] == 0:
            # The sampler reads the last token, so it cannot be withdrawn.
            kept = (*kept[:-1], (*kept[-1][:-1], rounded_count(ordered[-1].length, 1, self.block)))
        asked = IMAGE_QUERIES if self.rule.kind == "image" else 0
        windows = self.rule.ends(prompt, ordered)
        if asked and self.withdraws:
            # One more token, so that no step leaves the layers behind the withdrawal without any.
            windows = tuple(min(end + 1, len(prompt)) for end in windows)
        return RequestPlan(len(prompt), ordered, kept, windows, asked)
