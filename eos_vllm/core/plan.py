"""The reduction plan of one request: a pure function of profile, image spans and budget.

The scheduler, each worker and the reference compute it for themselves and must agree; nothing here depends on
weights, on attention scores, or on the tokens that were generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from eos_vllm.core.budget import kept_counts
from eos_vllm.core.profile import Profile

_REMEMBERED = 4096


@dataclass(frozen=True)
class ImageSpan:
    """Where the visual tokens of one image stand in the unreduced prompt: ``[start, start + length)``."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class RequestPlan:
    """What is kept of one request.

    Attributes:
        prompt_length: tokens of the unreduced prompt, visual ones included.
        spans: the images, ascending and disjoint.
        kept: for each image the visual tokens left in each segment; ``kept[i][0]`` is the image's own length.
    """

    prompt_length: int
    spans: tuple[ImageSpan, ...]
    kept: tuple[tuple[int, ...], ...]

    @property
    def num_segments(self) -> int:
        return len(self.kept[0]) if self.kept else 1

    @cached_property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each segment lacks once the prompt is in: the one number per segment that serving needs."""
        if not self.kept:
            return ()
        return tuple(sum(k[0] - k[s] for k in self.kept) for s in range(self.num_segments))

    @property
    def reduces(self) -> bool:
        """Whether any segment lacks any token."""
        return any(self.removed)

    @property
    def images_end(self) -> int:
        """Position after the last visual token; 0 for text only."""
        return self.spans[-1].end if self.spans else 0

    @property
    def last_token_is_visual(self) -> bool:
        """Whether the prompt ends in an image, whose last token is then kept for the sampler (design section 3)."""
        return bool(self.spans) and self.images_end == self.prompt_length

    def segment_length(self, segment: int, num_tokens: int) -> int:
        """Tokens that segment ``segment`` caches when the first ``num_tokens`` tokens of the request are in.

        Exact for whole prompts and later. Within an image, which serving never splits, it is the most that may be kept.
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
        return self.spans[image].start - sum(k[0] - k[segment] for k in self.kept[:image])

    def query_positions(self, image: int) -> tuple[int, ...]:
        """Unreduced positions of the text that image ``image`` is asked about: prompt text behind it.

        Text in front of later images counts too; where there is none it is the prompt's last token (design section 3).
        """
        starts = [span.start for span in self.spans[image + 1 :]] + [self.prompt_length]
        ends = [span.end for span in self.spans[image:]]
        text = tuple(p for end, start in zip(ends, starts, strict=True) for p in range(end, start))
        return text or (self.prompt_length - 1,)


class Planner:
    """Plans requests for one profile; remembers the counts of each budget, for schedulers ask often."""

    def __init__(self, profile: Profile, budget: int | None = None) -> None:
        """``budget`` replaces the profile's own where a request names none (``--eos-retain``)."""
        self.profile = profile
        self.budget = profile.budget.tokens if budget is None else budget
        self._counts: dict[int, tuple[int, ...]] = {}

    def counts(self, budget: int | None = None) -> tuple[int, ...]:
        """Counts of :func:`eos_vllm.core.budget.kept_counts`, with the same errors."""
        budget = self.budget if budget is None else budget
        if (counts := self._counts.get(budget)) is None:
            if len(self._counts) >= _REMEMBERED:
                self._counts.clear()
            counts = self._counts[budget] = kept_counts(self.profile, budget)
        return counts

    def plan(self, prompt_length: int, spans: Sequence[ImageSpan], budget: int | None = None) -> RequestPlan:
        """Plans one request.

        Args:
            prompt_length: tokens of the prompt, each image counted with all its visual tokens.
            spans: where the images are; sorted here.
            budget: retain budget per image, as the request names it.

        Returns:
            The plan. An image shorter than a count keeps what it has.

        Raises:
            BudgetError: as :func:`eos_vllm.core.budget.kept_counts`.
            ValueError: spans that overlap or leave the prompt.
        """
        ordered = tuple(sorted(spans, key=lambda span: span.start))
        if not ordered:
            return RequestPlan(prompt_length, (), ())
        ends = [0, *(span.end for span in ordered)]
        if any(span.start < end for span, end in zip(ordered, ends, strict=False)) or ends[-1] > prompt_length:
            raise ValueError(f"image spans {ordered} overlap or leave the prompt of {prompt_length} tokens")
        counts = self.counts(budget)
        kept = tuple((span.length, *(min(count, span.length) for count in counts)) for span in ordered)
        return RequestPlan(prompt_length, ordered, kept)
