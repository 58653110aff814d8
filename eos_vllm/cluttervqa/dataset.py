"""Samples of ClutterVQA by split and index, their export as PNG and JSONL, and how replies are marked.

A sample's scene and pixels depend on its version, split, index and window only, its questions also on ``questions`` and
``kinds``: splits and versions never share a seed, machines agree byte for byte, and any number of processes may share
the work.
"""

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from eos_vllm.cluttervqa.questions import Question, ask
from eos_vllm.cluttervqa.scene import FRAME_CELLS, Object, Scene
from eos_vllm.cluttervqa.versions import version_of
from eos_vllm.core.errors import EosError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One image with its questions.

    ``pixels`` is RGB uint8, ``[96, 96, 3]`` in version 1, ``[336, 336, 3]`` in version 2, less for a smaller window.
    """

    name: str
    pixels: np.ndarray
    scene: Scene
    questions: tuple[Question, ...]
    version: int = 1

    @property
    def image(self) -> Image.Image:
        """The image for Pillow."""
        return Image.fromarray(self.pixels)


def make_sample(
    split: str,
    index: int,
    questions: int | None = None,
    cells: int = FRAME_CELLS,
    kinds: tuple[str, ...] | None = None,
    version: int = 1,
) -> Sample:
    """The sample number ``index`` of a split.

    Args:
        split: one of ``SPLITS``.
        index: 0 or more.
        questions: questions wanted, one of each kind where None; their kinds take turns in ``kinds``. A scene may admit
            fewer.
        cells: side of the window in cells, 4 for the whole frame.
        kinds: kinds to ask about; a kind may stand there more than once. All of the version's where None.
        version: of the benchmark.

    Raises:
        EosError: unknown split, kind or version.
    """
    _check_split(split)
    drawn = version_of(version)
    kinds = drawn.kinds if kinds is None else kinds
    for kind in kinds:
        if kind not in drawn.kinds:
            raise EosError("kinds", kind, "is unknown", f"choose from {', '.join(drawn.kinds)}")
    numbers = random.Random(f"{drawn.seed}/{split}/{index}/{cells}")
    scene = drawn.draw(numbers, cells)
    pixels = drawn.paint(scene, numbers)
    wanted = [kinds[i % len(kinds)] for i in range(len(drawn.kinds) if questions is None else questions)]
    asked = ask(scene, numbers, wanted, drawn.generators)
    return Sample(f"{split}-{index:06d}", pixels, scene, tuple(asked), version)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise EosError("split", split, "is unknown", f"choose one of {', '.join(SPLITS)}")


def samples(split: str, count: int, questions: int | None = None, start: int = 0, version: int = 1) -> Iterator[Sample]:
    """``count`` samples of a split, from number ``start``; ``questions`` and ``version`` as in :func:`make_sample`."""
    return (make_sample(split, index, questions, version=version) for index in range(start, start + count))


def is_right(reply: str, answer: str) -> bool:
    """Whether a model's reply is the answer; case, blanks around it and a full stop behind it don't matter."""
    return reply.strip().lower().rstrip(".") == answer.lower()


def rows_of(sample: Sample) -> list[dict]:
    """The lines of a sample's questions in the exported JSONL, which load tests and ``vllm bench`` read as they are."""
    image = f"images/{sample.name.split('-')[-1]}.png"
    return [
        {
            "id": f"{sample.name}-{number:02d}",
            "kind": question.kind,
            "form": question.form,
            "prompt": question.text,
            "answer": question.answer,
            "choices": question.choices,
            "image_files": [image],
            "boxes": _boxes(sample.scene.objects),
        }
        | ({} if sample.version == 1 else {"needs": _boxes(question.needs)})
        for number, question in enumerate(sample.questions)
    ]


def _boxes(things: Sequence[Object]) -> list[list[int]]:
    return [list(thing.box) for thing in things]


def export(
    folder: str | Path,
    split: str = "test",
    images: int = 100,
    questions: int | None = None,
    processes: int = 1,
    version: int = 1,
    start: int = 0,
) -> Path:
    """Writes ``images/*.png`` and ``<split>.jsonl`` to a new or empty folder and returns the JSONL's path.

    Args:
        folder: where to.
        split: one of ``SPLITS``.
        images: how many.
        questions: questions per image; one of each kind where None.
        processes: processes that share the work; the bytes written don't depend on it.
        version: of the benchmark.
        start: number of the first image in its split.

    Raises:
        EosError: unknown split or version, or a folder that is a file, holds anything or cannot be created.
    """
    _check_split(split)
    version_of(version)
    path = _make_folder(Path(folder))
    make, numbers = partial(_write_sample, path, split, questions, version), range(start, start + images)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            written = list(pool.map(make, numbers, chunksize=64))
    else:
        written = [make(index) for index in numbers]
    file = path / f"{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for rows in written for row in rows), encoding="utf-8")
    return file


def _make_folder(path: Path) -> Path:
    remedy = "name a new or empty folder"
    try:
        if path.is_dir() and any(path.iterdir()):
            raise EosError("folder", str(path), "is not empty", remedy)
        (path / "images").mkdir(parents=True)
    except OSError as error:
        raise EosError("folder", str(path), f"cannot be created ({error.strerror})", remedy) from error
    return path


def _write_sample(path: Path, split: str, questions: int | None, version: int, index: int) -> list[dict]:
    sample = make_sample(split, index, questions, version=version)
    rows = rows_of(sample)
    sample.image.save(path / f"images/{index:06d}.png", compress_level=1)
    return rows
