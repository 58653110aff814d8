"""Which part of a prompt may score an image, and so how much of the prompt decides what is kept of it.

What is kept of an image is a function of the prompt up to the end of its window, and of nothing behind it. The earlier
windows end, the more of a reduced prompt can be cached and shared.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from eos_vllm.core.profile import WindowKind

if TYPE_CHECKING:
    from eos_vllm.core.plan import ImageSpan

# One row of patches of a 336-pixel CLIP tower: these last tokens of an image ask where the rule is "image".
IMAGE_QUERIES = 24
# Of unlike endings, for tokens at a border depend on what stands in front of it.
_QUESTIONS = ("What is it?", "Name 3", "how many")


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


def generation_marker(tokens: Callable[[Sequence[str], bool], Sequence[int]]) -> tuple[int, ...]:
    """Tokens of a chat template's generation prompt as they stand behind a question.

    They are found by rendering, and proved on chats. A template without one (Mistral's) marks the end of the question
    instead; those tokens are taken then.

    Args:
        tokens: those of a chat about an image, given the texts of its turns, and whether the generation prompt follows.

    Raises:
        ValueError: there is none that can be told from the text around it, and why.
    """
    found = set()
    for question in _QUESTIONS:
        whole, bare = tokens([question], True), tokens([question], False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, bare, strict=False)))
        found.add(tuple(whole[same:]))
    if found == {()}:
        found = {_common_end([tokens([question], True) for question in _QUESTIONS])}
    if len(found) != 1 or not (marker := found.pop()):
        raise ValueError(f"its generation prompt has no fixed tokens ({sorted(found)})")
    rule = WindowRule("turn", marker)
    for question, later in itertools.pairwise(_QUESTIONS):
        whole, chat = list(tokens([question], True)), list(tokens([question, "It is red.", later], True))
        end = rule._first_end(chat, 1)
        if end != len(whole) or chat[:end] != whole:
            raise ValueError("the tokens of a first turn change when a chat goes on")
    return marker


def _common_end(chats: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Tokens in which all chats end."""
    columns = zip(*(reversed(chat) for chat in chats), strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))[::-1]
