"""Training batches: windows of ClutterVQA scenes, with ten questions behind each image that don't see one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from eos_search.training.recipe import MIX, Part
from eos_vllm.cluttervqa import Question, Sample, make_sample, version_of
from eos_vllm.cluttervqa.scene import CELL, FRAME_CELLS, PATCH
from eos_vllm.models.model_files import CLIP_MEAN, CLIP_STD
from eos_vllm.models.tokenizer import BOS, EOS_ID, FIRST_FREE_ID, build_tokenizer, word_pieces

PREFIX = f"{BOS}USER: "
QUESTIONS = 10
FRAME_PATCHES = FRAME_CELLS * CELL // PATCH
CELL_PATCHES = CELL // PATCH
_PADDING = -1


@lru_cache
def _tokenizer(version: int) -> Any:
    words = version_of(version).words
    return build_tokenizer(FIRST_FREE_ID + 2 + len(word_pieces(words)), FIRST_FREE_ID, words)


@lru_cache(maxsize=65536)
def encode(text: str, version: int = 1) -> tuple[int, ...]:
    """Token ids of a text under the words of a version of the benchmark, without special tokens in front."""
    return tuple(_tokenizer(version).encode(text, add_special_tokens=False).ids)


def prefix_ids(version: int = 1) -> tuple[int, ...]:
    """What stands in front of the image in LLaVA-1.5's chat form."""
    return encode(PREFIX, version)


@dataclass
class Batch:
    """Images of one window size with their questions, text packed one question behind the other.

    Attributes:
        version: of the benchmark.
        pixels: normalised as the image processor does, ``[B, 3, side, side]``.
        origin: first patch row and column of the window in the frame, ``[B, 2]``.
        labels: the version's ``patch_labels``, ``[B, patches, 3]``, in version 2 4.
        whole: the version's ``scene_labels``, ``[B, labels]``.
        ids: text tokens, ``[B, T]``.
        segment: number of the question that a text token belongs to, -1 at padding, ``[B, T]``.
        offset: place of a text token in its question, ``[B, T]``.
        asked: image and text index of the tokens behind which one of the answer's comes, ``[A, 2]``.
        answer: that token of the answer, ``[A]``; one for each question in version 1, more for strings.
        value: token of what is to be seen; differs from ``answer`` for options, ``[A]``.
        whose: number of the question in the batch, ``[A]``.
        last: image and text index of the answer's last token, ``[Q, 2]``.
        kind: index into the version's kinds, ``[Q]``.
        named: image and text index of the tokens that name an object, ``[M, 2]``.
        centre: that object's centre, row and column as a share of the frame, ``[M, 2]``; in version 2 that of its first
            patch.
        aiming: which of ``asked`` are about one object, ``[N]``.
        aim: the middle of the patch that they are about, as ``centre``; of strings the next character's, ``[N, 2]``.
    """

    version: int
    pixels: torch.Tensor
    origin: torch.Tensor
    labels: torch.Tensor
    whole: torch.Tensor
    ids: torch.Tensor
    segment: torch.Tensor
    offset: torch.Tensor
    asked: torch.Tensor
    answer: torch.Tensor
    value: torch.Tensor
    whose: torch.Tensor
    last: torch.Tensor
    kind: torch.Tensor
    named: torch.Tensor
    centre: torch.Tensor
    aiming: torch.Tensor
    aim: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "version"}
        return Batch(self.version, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples of one version and window size together."""
    version = samples[0].version
    benchmark = version_of(version)
    pixels = torch.from_numpy(np.stack([s.pixels for s in samples])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    ids: list[list[int]] = []
    segments: list[list[int]] = []
    offsets: list[list[int]] = []
    answer: list[int] = []
    value: list[int] = []
    whose: list[int] = []
    kind: list[int] = []
    aiming: list[int] = []
    asked: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    named: list[tuple[int, int]] = []
    centre: list[tuple[float, float]] = []
    aim: list[tuple[float, float]] = []
    for row, sample in enumerate(samples):
        line: list[int] = []
        segment: list[int] = []
        offset: list[int] = []
        for number, question in enumerate(sample.questions):
            tokens = encode(f"\n{question.text} ASSISTANT:", version)
            reply = encode(f" {question.answer}", version)
            start = len(line)
            for place, where in _names(question, tokens, version):
                named.append((row, start + place))
                centre.append(where)
            for place, where in _aims(question):
                aiming.append(len(asked) + place)
                aim.append(where)
            end = start + len(tokens)
            asked += [(row, end - 1 + place) for place in range(len(reply))]
            answer += reply
            value += reply if question.value == question.answer else encode(f" {question.value}", version)
            whose += [len(kind)] * len(reply)
            kind.append(benchmark.kinds.index(question.kind))
            # The end token is predicted from the answer's last, and read by nothing.
            last.append((row, end + len(reply) - 1))
            line += [*tokens, *reply]
            segment += [number] * (len(tokens) + len(reply))
            offset += range(len(tokens) + len(reply))
        ids.append(line)
        segments.append(segment)
        offsets.append(offset)
    return Batch(
        version,
        pixels=(pixels - mean) / std,
        origin=torch.tensor([[cell * CELL_PATCHES for cell in s.scene.origin] for s in samples]),
        labels=torch.from_numpy(np.stack([benchmark.patch_labels(s.scene) for s in samples])),
        whole=torch.from_numpy(np.stack([benchmark.scene_labels(s.scene) for s in samples])),
        ids=_pad(ids, EOS_ID),
        segment=_pad(segments, _PADDING),
        offset=_pad(offsets, 0),
        asked=torch.tensor(asked),
        answer=torch.tensor(answer),
        value=torch.tensor(value),
        whose=torch.tensor(whose),
        last=torch.tensor(last),
        kind=torch.tensor(kind),
        named=torch.tensor(named, dtype=torch.long).view(-1, 2),
        centre=torch.tensor(centre).view(-1, 2),
        aiming=torch.tensor(aiming, dtype=torch.long),
        aim=torch.tensor(aim).view(-1, 2),
    )


def _names(question: Question, tokens: tuple[int, ...], version: int = 1) -> Iterator[tuple[int, tuple[float, float]]]:
    """Places of the tokens that name the objects in question, with the objects' centres as shares of the frame.

    An object's name is its kind where that stands in the text, else its colour. A choice that asks for a kind has it
    among its options: there the right option is the name. Counting names no object. In version 2 questions tell their
    names themselves; the last word of one has seen the others.
    """
    for name, thing in question.names:
        words = encode(f" {name}", version)
        starts = [i for i in range(len(tokens)) if tokens[i : i + len(words)] == words]
        yield starts[0] + len(words) - 1, _patch_centre(*thing.patches[0])
    if question.kind == "counting" or version > 1:
        return
    for named in question.about:
        for word in (named.kind, named.colour):
            token = encode(f" {word}")[0]
            if token in tokens:
                y, x = named.centre
                yield tokens.index(token), (y / (FRAME_PATCHES * PATCH), x / (FRAME_PATCHES * PATCH))
                break


def _aims(question: Question) -> Iterator[tuple[int, tuple[float, float]]]:
    """For questions of version 2 about one object: places in the answer, and the patch that tells what stands there."""
    if len(question.names) != 1:
        return
    ((_, thing),) = question.names
    patches = thing.patches if question.kind == "reading" else thing.patches[:1]
    for place, patch in enumerate(patches):
        yield place, _patch_centre(*patch)


def _patch_centre(row: int, column: int) -> tuple[float, float]:
    return (row + 0.5) / FRAME_PATCHES, (column + 0.5) / FRAME_PATCHES


def _pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


class Steps(IterableDataset):
    """The parts of each training step as batches; step ``n`` of a stage is the same whenever it is drawn."""

    def __init__(
        self,
        stage: int,
        parts: Sequence[Part],
        start: int,
        stop: int,
        mix: tuple[str, ...] = MIX,
        version: int = 1,
    ) -> None:
        self.stage, self.parts, self.start, self.stop = stage, tuple(parts), start, stop
        self.mix, self.version = mix, version

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in range(self.start, self.stop):
            yield [self._draw(step, number, part) for number, part in enumerate(self.parts)]

    def _draw(self, step: int, number: int, part: Part) -> Batch:
        # Windows of one size may stand in several parts of a stage: no two of them share an index.
        first = ((self.stage * 1_000_000 + step) * 10 + number) * 1_000
        questions = QUESTIONS if part.questions else 1
        return collate(
            [make_sample("train", first + i, questions, part.cells, self.mix, self.version) for i in range(part.images)]
        )


def loader(
    stage: int, parts: Sequence[Part], start: int, stop: int, mix: tuple[str, ...] = MIX, version: int = 1
) -> DataLoader:
    """Batches drawn by a process beside the training."""
    steps = Steps(stage, parts, start, stop, mix, version)
    return DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=4)
