"""Scenes of version 2: small things and strings, labelled as painted, legible, the same everywhere."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.cluttervqa import make_sample, samples
from eos_vllm.cluttervqa.glyphs import DIGITS, LETTERS, SHAPES
from eos_vllm.cluttervqa.scene import COLOUR_NAMES
from eos_vllm.cluttervqa.small import (
    CELL,
    CHARACTERS,
    CODE,
    CODE_LENGTHS,
    FILLS,
    GLYPH,
    MOST_COUNTED,
    NUMBER_LENGTHS,
    ORDERS,
    PATCH,
    TINTS,
    TYPES,
    make_scene,
    paint,
    patch_labels,
    scene_labels,
    thing_mask,
)

DIGEST = "1fe9cff71ea47aa2205b0204e3e4ca22f78bdfbbfb264373ef82b5a262a7ec05"
ORDERS_OF = {(place, last): 1 + 2 * place + last for place in range(6) for last in (False, True)}
SEEDS, CELLS = st.integers(0, 2**32), st.sampled_from((2, 3, 4))


def test_samples_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for sample in samples("test", 20, questions=10, version=2):
        digest.update(sample.pixels.tobytes())
        digest.update("\n".join(f"{q.text}\t{q.answer}" for q in sample.questions).encode())
    assert digest.hexdigest() == DIGEST


def test_splits_indices_windows_and_versions_differ():
    drawn = [
        make_sample(split, index, 1, cells, version=version)
        for split in ("train", "validation", "test")
        for index in range(8)
        for cells in (2, 3, 4)
        for version in (1, 2)
    ]
    assert len({sample.pixels[:48, :48].tobytes() for sample in drawn}) == len(drawn)
    assert len({repr(sample.scene) for sample in drawn}) == len(drawn)


@given(SEEDS, CELLS)
def test_things_have_one_or_two_patches_and_none_in_common(seed, cells):
    scene = make_scene(random.Random(seed), cells)
    rows, columns = (range(6 * scene.origin[axis], 6 * (scene.origin[axis] + cells)) for axis in (0, 1))
    patches = [patch for thing in scene.objects for patch in thing.patches]
    assert len(set(patches)) == len(patches) <= 46
    assert all(row in rows and column in columns for row, column in patches)
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert (bottom - top, thing.size) == (GLYPH, GLYPH)
        assert right - left == (GLYPH + PATCH * (len(thing.text) - 1) if thing.text else GLYPH)
        assert len(thing.patches) == len(thing.text) if thing.text else len(thing.patches) in (1, 2)


@given(SEEDS, CELLS)
def test_scenes_are_as_they_are_planned(seed, cells):
    scene = make_scene(random.Random(seed), cells)
    assert 3 <= len(scene.shapes) <= 14
    assert 1 <= len(scene.strings) <= 3
    assert sum(scene.counted.value in (thing.colour, thing.kind) for thing in scene.shapes) == scene.counted.number
    assert scene.counted.number <= MOST_COUNTED
    assert (scene.counted.value in SHAPES) is (scene.frequent == "colour")
    assert scene.tint in TINTS
    assert len({thing.colour for thing in scene.strings}) == len(scene.strings)
    for thing in scene.shapes:
        assert (thing.kind in SHAPES, thing.fill in FILLS, thing.category) == (True, True, "shape")
    for thing in scene.strings:
        assert len(thing.text) in (CODE_LENGTHS if thing.kind == CODE else NUMBER_LENGTHS)
        assert thing.text[0] in (LETTERS if thing.kind == CODE else DIGITS[1:])
        assert set(thing.text) <= set(CHARACTERS if thing.kind == CODE else DIGITS)


def test_scenes_are_sparse_and_dense_and_hold_near_duplicates():
    drawn = [make_scene(random.Random(seed)) for seed in range(400)]
    assert {len(scene.shapes) for scene in drawn} == {*range(3, 6), *range(9, 15)}
    dense = sum(len(scene.shapes) >= 9 for scene in drawn)
    assert 150 < dense < 250
    twins = sum(
        any(
            a is not b and len(a.text) == len(b.text) and sum(x != y for x, y in zip(a.text, b.text, strict=True)) == 1
            for a in scene.strings
            for b in scene.strings
        )
        for scene in drawn
    )
    assert twins > 100
    two = [len(thing.patches) == 2 for scene in drawn for thing in scene.shapes]
    assert 0.4 < sum(two) / len(two) < 0.6


@given(SEEDS, CELLS)
def test_labels_say_what_each_patch_shows(seed, cells):
    scene = make_scene(random.Random(seed), cells)
    labels = patch_labels(scene).reshape(6 * cells, 6 * cells, 4)
    shown = {}
    for thing in scene.objects:
        for place, (row, column) in enumerate(thing.patches):
            name = thing.text[place] if thing.text else f"{thing.fill} {thing.kind}"
            at = row - 6 * scene.origin[0], column - 6 * scene.origin[1]
            order = ORDERS_OF[place, place + 1 == len(thing.text)] if thing.text else 0
            shown[at] = [1 + COLOUR_NAMES.index(thing.colour), 1 + TYPES.index(name), int(place == 0), order]
    assert {at: labels[at].tolist() for at in shown} == shown
    assert (labels[..., 0] > 0).sum() == len(shown)
    assert max(ORDERS_OF.values()) == ORDERS
    whole = scene_labels(scene)
    assert whole.sum() == len({(t.colour, t.kind) for t in scene.shapes}) + len(scene.strings) + 1
    assert set(np.unique(whole)) <= {0, 1}


def test_masks_tell_all_types_apart():
    drawn = {name: thing_mask(*reversed(name.split())) for name in TYPES}
    assert len({mask.tobytes() for mask in drawn.values()}) == len(TYPES)
    for name, mask in drawn.items():
        assert mask.shape == (GLYPH, GLYPH)
        nearest = min((mask ^ other).sum() for key, other in drawn.items() if key != name)
        assert nearest >= 4, name
    for shape in SHAPES:
        solid, hollow = thing_mask(shape), thing_mask(shape, "hollow")
        assert (solid & ~hollow).sum() == 16
        assert not (hollow & ~solid).any()


def read(box, candidates):
    """The type whose mask parts the pixels of a box best: least spread within what it covers and what it does not."""

    def spread(mask):
        return sum(((pixels - pixels.mean(axis=0)) ** 2).sum() for pixels in (box[mask], box[~mask]) if len(pixels))

    return min(candidates, key=lambda name: spread(thing_mask(*reversed(name.split()))))


@pytest.mark.parametrize("cells", [2, 4])
def test_every_shape_and_character_can_be_read_from_its_pixels(cells):
    """12 pixels are enough: what is painted, noise and clutter included, is told by its mask alone."""
    right = []
    for seed in range(25):
        numbers = random.Random(seed)
        scene = make_scene(numbers, cells)
        pixels = paint(scene, numbers).astype(float)
        assert pixels.shape == (CELL * cells, CELL * cells, 3)
        for thing in scene.objects:
            y, x = thing.top - CELL * scene.origin[0], thing.left - CELL * scene.origin[1]
            for place, character in enumerate(thing.text or " "):
                box = pixels[y : y + GLYPH, x + PATCH * place : x + PATCH * place + GLYPH]
                wanted = character if thing.text else f"{thing.fill} {thing.kind}"
                right.append(read(box, CHARACTERS if thing.text else TYPES[: -len(CHARACTERS)]) == wanted)
    assert len(right) > 200
    assert sum(right) >= 0.995 * len(right)


def test_a_frame_is_that_of_llava():
    sample = make_sample("test", 0, version=2)
    assert sample.pixels.shape == (336, 336, 3)
    assert (336 // PATCH) ** 2 == 576
    assert sample.image.size == (336, 336)


def test_the_tint_is_the_backgrounds():
    for seed in range(40):
        numbers = random.Random(seed)
        scene = make_scene(numbers)
        pixels = paint(scene, numbers).reshape(24, PATCH, 24, PATCH, 3).swapaxes(1, 2).reshape(576, -1, 3)
        mean = pixels[patch_labels(scene)[:, 0] == 0].mean(axis=(0, 1))
        base = mean.min()
        nearest = min(TINTS, key=lambda name: np.abs(mean - base - TINTS[name]).sum())
        assert nearest == scene.tint
