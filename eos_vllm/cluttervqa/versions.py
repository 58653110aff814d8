"""The versions of the benchmark: what is drawn, how it is painted, and what is asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eos_vllm.cluttervqa import questions, scene, small, small_questions
from eos_vllm.core.errors import EosError


@dataclass(frozen=True)
class Version:
    """One version; version 1 never changes, for results rest on it.

    Attributes:
        number: 1 or 2.
        kinds: of questions.
        words: of questions, answers and chat template, each with the blank in front of it.
        types: what a patch may show, beside background.
        patch: pixels on a side; a window of n cells has 6 * n patches on a side.
        draw: ``(random, cells)`` to a scene.
        paint: ``(scene, random)`` to RGB ``[side, side, 3]`` uint8.
        generators: of questions, by kind.
        patch_labels: scene to ``[patches, 3]``, in version 2 4, for losses on the vision tower.
        scene_labels: scene to labels of the whole window; none in version 1.
    """

    number: int
    kinds: tuple[str, ...]
    words: tuple[str, ...]
    types: tuple[str, ...]
    patch: int
    draw: Callable[..., Any]
    paint: Callable[..., np.ndarray]
    generators: Mapping[str, questions.Generator] | None
    patch_labels: Callable[[Any], np.ndarray]
    scene_labels: Callable[[Any], np.ndarray]

    @property
    def seed(self) -> str:
        """What the seeds of all samples start with: no two versions share one."""
        return "cluttervqa" if self.number == 1 else f"cluttervqa-{self.number}"

    @property
    def title(self) -> str:
        """Its name in results."""
        return "ClutterVQA" if self.number == 1 else f"ClutterVQA {self.number}"


def _nothing(_: Any) -> np.ndarray:
    return np.zeros(0, np.float32)


VERSIONS: Mapping[int, Version] = {
    1: Version(
        number=1,
        kinds=questions.KINDS,
        words=questions.WORDS,
        types=scene.TYPES,
        patch=scene.PATCH,
        draw=scene.make_scene,
        paint=scene.paint,
        generators=None,
        patch_labels=scene.patch_labels,
        scene_labels=_nothing,
    ),
    2: Version(
        number=2,
        kinds=small_questions.KINDS,
        words=small_questions.WORDS,
        types=small.TYPES,
        patch=small.PATCH,
        draw=small.make_scene,
        paint=small.paint,
        generators=small_questions.GENERATORS,
        patch_labels=small.patch_labels,
        scene_labels=small.scene_labels,
    ),
}


def version_of(number: int) -> Version:
    """The version of that number.

    Raises:
        EosError: there is none.
    """
    if number not in VERSIONS:
        raise EosError("version", number, "is none of ClutterVQA", f"choose from {', '.join(map(str, VERSIONS))}")
    return VERSIONS[number]
