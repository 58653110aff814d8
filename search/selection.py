"""Other choices of an image's tokens than the one that the question's own attention makes; all else is the profile's.

``random`` and ``oracle`` are no methods but yardsticks: they give scores in place of attention. ``earlier`` scores by
another question about the same image, as later turns of a chat find it under ``importance.window: "turn"``. ``image``
lets the image's own last tokens ask. ``rounded`` removes whole KV blocks only, as a server does. In chats ``turn`` lets
the first question choose for all turns, as ``importance.window`` has it, and ``prompt`` each turn anew.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eos_vllm.cluttervqa import Row
from eos_vllm.core.profile import SCHEMA, Profile, parse_profile

SELECTIONS = ("random", "oracle")
EARLIER = "earlier"
IMAGE = "image"
ROUNDED = "rounded"
WINDOWS = ("turn", "prompt")
# Tokens per KV block of vLLM's CPU build: the coarsest rounding that a server does by default.
BLOCK = 32


def asked_by_image(profile: Profile) -> Profile:
    """The profile with ``importance.queries: "image"``: the choice does not depend on the question."""
    data = profile.to_dict()
    data["importance"] = {"queries": "image", "heads": profile.importance.heads}
    return _labelled(data, f"{IMAGE}@{profile.name}")


def asked_within(profile: Profile, window: str) -> Profile:
    """The profile with this ``importance.window``.

    Raises:
        ProfileError: the image itself asks, whatever the window.
    """
    data = profile.to_dict()
    data["importance"]["window"] = window
    return _labelled(data, f"{window}@{profile.name}")


def _labelled(data: dict[str, Any], label: str) -> Profile:
    return parse_profile(data | {"schema": SCHEMA, "name": label, "description": "", "provenance": {}}, label)


def rows_before(rows: Sequence[Row]) -> list[int]:
    """For each row the place of the row in front of it about the same images; of the first one, the last.

    Every question is then asked once by tokens that another question chose, where its images have two or more.
    """
    places: dict[tuple[Path, ...], list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.image_files, []).append(i)
    before = list(range(len(rows)))
    for group in places.values():
        for i, earlier in zip(group, [group[-1], *group[:-1]], strict=True):
            before[i] = earlier
    return before


def selection_scores(selection: str, row: Row, side: int, pixels: int, seed: int = 0) -> torch.Tensor:
    """Scores of the patches of a row's image, ``[side * side]`` float32.

    ``random`` ranks them by lot, the same for every budget and every question about an image. ``oracle`` puts objects
    first, each from its middle outwards and all in turns, then the background by lot; it knows nothing of the question,
    unless the row says which objects that needs: then those, and all else by lot.

    Args:
        selection: one of ``SELECTIONS``.
        row: the question; its boxes say where the objects are, and which of them it needs.
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
    # What is needed is in every patch that shows a part of it; else a patch is an object's by its middle.
    boxes, edge = (row.boxes, 0.0) if row.needs is None else (row.needs, pixels / side / 2)
    for left, top, right, bottom in boxes:
        inside = (x > left - edge) & (x < right + edge) & (y > top - edge) & (y < bottom + edge)
        away = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs()) / (right - left)
        scores[inside.flatten()] = (2 - away + 1e-3 * scores.view(side, side)).flatten()[inside.flatten()]
    return scores
