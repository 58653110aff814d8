"""Training batches: windows of ClutterVQA scenes, with ten questions behind each image that don't see one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from eos_vllm.cluttervqa import KINDS, WORDS, Question, Sample, make_sample
from eos_vllm.cluttervqa.scene import CELL, FRAME_CELLS, PATCH
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.model_files import CLIP_MEAN, CLIP_STD
from eos_vllm.models.tokenizer import BOS, EOS_ID, build_tokenizer

PREFIX = f"{BOS}USER: "
QUESTIONS = 10
# Counting, relations and options are slowest to learn.
MIX = (
    "presence",
    "attribute",
    "counting",
    "relation",
    "reading",
    "choice",
    "counting",
    "relation",
    "choice",
    "presence",
)
FRAME_PATCHES = FRAME_CELLS * CELL // PATCH
_PADDING = -1


@lru_cache(maxsize=1)
def _tokenizer():
    return build_tokenizer(SHAPE.vocab_size, SHAPE.image_token_id, WORDS)


@lru_cache(maxsize=65536)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text, without special tokens in front."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


def prefix_ids() -> tuple[int, ...]:
    """What stands in front of the image in LLaVA-1.5's chat form."""
    return encode(PREFIX)


@dataclass
class Batch:
    """Images of one window size with their questions, text packed one question behind the other.

    Attributes:
        pixels: normalised as the image processor does, ``[B, 3, side, side]``.
        origin: first patch row and column of the window in the frame, ``[B, 2]``.
        labels: :func:`eos_vllm.cluttervqa.scene.patch_labels`, ``[B, patches, 3]``.
        ids: text tokens, ``[B, T]``.
        segment: number of the question that a text token belongs to, -1 at padding, ``[B, T]``.
        offset: place of a text token in its question, ``[B, T]``.
        asked: image and text index of the token behind which the answer comes, ``[Q, 2]``.
        answer: the answer's token, ``[Q]``.
        value: token of what is to be seen; differs from ``answer`` for options, ``[Q]``.
        kind: index into ``KINDS``, ``[Q]``.
        named: image and text index of the tokens that name an object, ``[M, 2]``.
        centre: that object's centre, row and column as a share of the frame, ``[M, 2]``.
    """

    pixels: torch.Tensor
    origin: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    segment: torch.Tensor
    offset: torch.Tensor
    asked: torch.Tensor
    answer: torch.Tensor
    value: torch.Tensor
    kind: torch.Tensor
    named: torch.Tensor
    centre: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples of one window size together."""
    from eos_vllm.cluttervqa.scene import patch_labels

    pixels = torch.from_numpy(np.stack([s.pixels for s in samples])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    ids: list[list[int]] = []
    segments: list[list[int]] = []
    offsets: list[list[int]] = []
    asked, answer, value, kind, named, centre = [], [], [], [], [], []
    for row, sample in enumerate(samples):
        line: list[int] = []
        segment: list[int] = []
        offset: list[int] = []
        for number, question in enumerate(sample.questions):
            tokens = encode(f"\n{question.text} ASSISTANT:")
            reply = encode(f" {question.answer}")
            start = len(line)
            asked.append((row, start + len(tokens) - 1))
            answer.append(reply[0])
            value.append(encode(f" {question.value}")[0])
            kind.append(KINDS.index(question.kind))
            for place, where in _names(question, tokens):
                named.append((row, start + place))
                centre.append(where)
            # The end token is predicted from the answer, and read by nothing.
            line += [*tokens, reply[0]]
            segment += [number] * (len(tokens) + 1)
            offset += range(len(tokens) + 1)
        ids.append(line)
        segments.append(segment)
        offsets.append(offset)
    return Batch(
        pixels=(pixels - mean) / std,
        origin=torch.tensor([[cell * CELL // PATCH for cell in s.scene.origin] for s in samples]),
        labels=torch.from_numpy(np.stack([patch_labels(s.scene) for s in samples])),
        ids=_pad(ids, EOS_ID),
        segment=_pad(segments, _PADDING),
        offset=_pad(offsets, 0),
        asked=torch.tensor(asked),
        answer=torch.tensor(answer),
        value=torch.tensor(value),
        kind=torch.tensor(kind),
        named=torch.tensor(named, dtype=torch.long).view(-1, 2),
        centre=torch.tensor(centre).view(-1, 2),
    )


def _names(question: Question, tokens: tuple[int, ...]) -> Iterator[tuple[int, tuple[float, float]]]:
    """Places of the tokens that name the objects in question, with the objects' centres as shares of the frame.

    An object's name is its kind where that stands in the text, else its colour. A choice that asks for a kind has it
    among its options: there the right option is the name. Counting names no object.
    """
    if question.kind == "counting":
        return
    for thing in question.about:
        for word in (thing.kind, thing.colour):
            token = encode(f" {word}")[0]
            if token in tokens:
                y, x = thing.centre
                yield tokens.index(token), (y / (FRAME_PATCHES * PATCH), x / (FRAME_PATCHES * PATCH))
                break


def _pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


@dataclass(frozen=True)
class Part:
    """A share of each step: so many images of a window size; without questions only the tower's losses count."""

    cells: int
    images: int
    questions: bool = True


class Steps(IterableDataset):
    """The parts of each training step as batches; step ``n`` of a stage is the same whenever it is drawn."""

    def __init__(self, stage: int, parts: Sequence[Part], start: int, stop: int) -> None:
        self.stage, self.parts, self.start, self.stop = stage, tuple(parts), start, stop

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in range(self.start, self.stop):
            yield [self._draw(step, number, part) for number, part in enumerate(self.parts)]

    def _draw(self, step: int, number: int, part: Part) -> Batch:
        # Windows of one size may stand in several parts of a stage: no two of them share an index.
        first = ((self.stage * 1_000_000 + step) * 10 + number) * 1_000
        return collate(
            [
                make_sample("train", first + i, QUESTIONS if part.questions else 1, part.cells, MIX)
                for i in range(part.images)
            ]
        )


def loader(stage: int, parts: Sequence[Part], start: int, stop: int) -> DataLoader:
    """Batches drawn by a process beside the training."""
    return DataLoader(Steps(stage, parts, start, stop), batch_size=None, num_workers=1, prefetch_factor=4)
