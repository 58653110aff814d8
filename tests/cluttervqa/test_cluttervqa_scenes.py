"""Scenes of ClutterVQA: the same everywhere, within the frame, and labelled as painted."""

import hashlib
import random

import numpy as np
import pytest

from eos_vllm.cluttervqa import make_sample, samples, scene
from eos_vllm.cluttervqa.glyphs import SHAPES, TYPES, mask
from eos_vllm.cluttervqa.scene import CELL, COLOUR_NAMES, COLOURS, PATCH, SIZES, make_scene, paint, patch_labels
from eos_vllm.core.errors import EosError

DIGEST = "e0057082618210844b2200a5d8981933ede31d29380b1432d77eeb87e345a409"


def test_samples_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for sample in samples("test", 40, questions=12):
        digest.update(sample.pixels.tobytes())
        digest.update("\n".join(f"{q.text}\t{q.answer}" for q in sample.questions).encode())
    assert digest.hexdigest() == DIGEST


def test_splits_indices_and_windows_differ():
    pixels = [
        make_sample(split, index, cells=cells).pixels[:48, :48].tobytes()
        for split in ("train", "validation", "test")
        for index in range(20)
        for cells in (2, 3, 4)
    ]
    assert len(set(pixels)) == len(pixels)


@pytest.mark.parametrize("cells", [2, 3, 4])
def test_objects_are_small_apart_and_on_the_grid(cells):
    totals = set()
    for seed in range(200):
        scene = make_scene(random.Random(seed), cells)
        totals.add(len(scene.objects))
        taken = set()
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert thing.size in SIZES
            assert 3 * PATCH <= thing.size <= 5 * PATCH
            assert left % PATCH == top % PATCH == 0
            row, column = top // CELL - scene.origin[0], left // CELL - scene.origin[1]
            assert 0 <= row < cells
            assert 0 <= column < cells
            assert (bottom - 1) // CELL == top // CELL
            assert (right - 1) // CELL == left // CELL
            taken.add((row, column))
        assert len(taken) == len(scene.objects)
        number = sum(scene.counted.value in (thing.colour, thing.kind) for thing in scene.objects)
        assert number == scene.counted.number
    assert totals == set(range(2, (6 if cells > 2 else 4) + 1))


def test_painted_objects_are_of_their_colour():
    for seed in range(30):
        numbers = random.Random(seed)
        scene = make_scene(numbers)
        pixels = paint(scene, numbers)
        assert pixels.shape == (96, 96, 3)
        assert pixels.dtype == np.uint8
        for thing in scene.objects:
            box = pixels[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size]
            mean = box[mask(thing.kind, thing.size)].mean(axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
            assert nearest == thing.colour


def test_masks_tell_all_kinds_apart_at_every_size():
    for size in SIZES:
        drawn = {kind: mask(kind, size) for kind in TYPES}
        assert len({m.tobytes() for m in drawn.values()}) == len(TYPES)
        assert all(0.15 < m.mean() <= 1 for m in drawn.values())
    for shape in SHAPES:
        assert mask(shape, 16)[:, ::-1].tolist() == mask(shape, 16).tolist()


@pytest.mark.parametrize("cells", [2, 4])
def test_patch_labels_cover_the_boxes(cells):
    for seed in range(30):
        scene = make_scene(random.Random(seed), cells)
        labels = patch_labels(scene).reshape(cells * 6, cells * 6, 3)
        assert (labels[..., 0] > 0).sum() == sum((thing.size // PATCH) ** 2 for thing in scene.objects)
        assert labels[..., 2].sum() == len(scene.objects)
        for thing in scene.objects:
            y, x = (int(v / PATCH - 6 * o) for v, o in zip(thing.centre, scene.origin, strict=True))
            assert labels[y, x].tolist() == [1 + COLOUR_NAMES.index(thing.colour), 1 + TYPES.index(thing.kind), 1]


def test_patch_labels_follow_the_patch_size(monkeypatch):
    monkeypatch.setattr(scene, "PATCH", 2)
    thing = scene.Object("circle", "red", left=52, top=76, size=12)
    window = scene.Scene((thing,), scene.Count("red", 1), cells=2, origin=(2, 2))
    labels = patch_labels(window).reshape(24, 24, 3)
    rows, columns = np.nonzero(labels[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (14, 19, 2, 7)


def test_unknown_split_and_kind_are_refused():
    with pytest.raises(EosError, match="split='holdout'"):
        make_sample("holdout", 0)
    with pytest.raises(EosError, match="kinds='colour'"):
        make_sample("test", 0, kinds=("colour",))
