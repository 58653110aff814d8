"""Selections that are no method but a yardstick: random patches, and those of the objects.

They give the scores of an image's visual tokens in place of attention; everything else is the profile's.
"""

import random

import torch

from eos_vllm.cluttervqa import Row

SELECTIONS = ("random", "oracle")


def selection_scores(selection: str, row: Row, side: int, pixels: int, seed: int = 0) -> torch.Tensor:
    """Scores of the patches of a row's image, ``[side * side]`` float32.

    ``random`` ranks them by lot, the same for every budget and every question about an image. ``oracle`` puts objects
    first, each from its middle outwards and all in turns, then the background by lot; it knows nothing of the question.

    Args:
        selection: one of ``SELECTIONS``.
        row: the question; its boxes say where the objects are.
        side: patches on a side.
        pixels: pixels on a side.
        seed: another seed gives another lot.
    """
    numbers = random.Random(f"{selection}/{seed}/{row.image_files[0].name if row.image_files else row.id}")
    scores = torch.tensor([numbers.random() for _ in range(side * side)])
    if selection == "random":
        return scores
    axis = (torch.arange(side) + 0.5) * pixels / side
    y, x = axis[:, None], axis[None, :]
    for left, top, right, bottom in row.boxes:
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        away = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs()) / (right - left)
        scores[inside.flatten()] = (2 - away + 1e-3 * scores.view(side, side)).flatten()[inside.flatten()]
    return scores
