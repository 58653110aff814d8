"""Which part of a prompt may score an image, and so how much of the prompt decides what is kept of it.

What is kept of an image is a function of the prompt up to the end of its window, and of nothing behind it. The earlier
windows end, the more of a reduced prompt can be cached and shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from eos_vllm.core.profile import WindowKind

if TYPE_CHECKING:
    from eos_vllm.core.plan import ImageSpan

# One row of patches of a 336-pixel CLIP tower: these last tokens of an image ask where the rule is "image".
IMAGE_QUERIES = 24


@dataclass(frozen=True)
class WindowRule:
    """Where windows end.

    Attributes:
        kind: ``prompt``: all later text of the prompt asks. ``turn``: the text up to and including the first generation
            prompt of the chat template. ``image``: the image's own last tokens ask.
        marker: tokens of the generation prompt; without them windows of kind ``turn`` end with the prompt.
    """

    kind: WindowKind = "prompt"
    marker: tuple[int, ...] = ()

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the tokens of the prompt matter, and not their number alone."""
        return self.kind == "turn" and bool(self.marker)

    def ends(self, prompt: Sequence[int], spans: Sequence["ImageSpan"]) -> tuple[int, ...]:
        """Position behind each image's window.

        Args:
            prompt: its tokens.
            spans: its images, ascending.
        """
        if self.kind == "image":
            return tuple(span.end for span in spans)
        if not self.reads_tokens:
            return (len(prompt),) * len(spans)
        ends: list[int] = []
        for span in spans:
            if not ends or ends[-1] < span.end:
                ends.append(self._first_end(prompt, span.end))
            else:
                ends.append(ends[-1])
        return tuple(ends)

    def _first_end(self, prompt: Sequence[int], start: int) -> int:
        marker, width = list(self.marker), len(self.marker)
        for position in range(start, len(prompt) - width + 1):
            if prompt[position] == marker[0] and list(prompt[position : position + width]) == marker:
                return position + width
        return len(prompt)
