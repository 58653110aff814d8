"""Scenes of ClutterVQA: a few small coloured objects on a noisy, cluttered background, painted patch by patch.

A scene lies on a grid of cells of 24 pixels (6 patches of 4), at most one object in each. A window of fewer cells is a
cut-out of the full frame: training starts on those, at a fraction of the cost.
"""

import random
from dataclasses import dataclass

import numpy as np

from eos_vllm.cluttervqa.glyphs import DIGITS, LETTERS, SHAPES, TYPES, mask

PATCH = 4
CELL = 24
FRAME_CELLS = 4
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 180, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 205, 45),
    "purple": (165, 55, 200),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = (12, 16, 20)  # 3, 4 or 5 patches
MOST_OBJECTS = 6
MOST_COUNTED = 3
_COLOUR_JITTER = 24
_BLOCK = 8
_SPECKS = 10


@dataclass(frozen=True)
class Object:
    """One object: what it is, and its box in pixels of the full frame (multiples of the patch size)."""

    kind: str
    colour: str
    left: int
    top: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.left + self.size, self.top + self.size

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the middle, in pixels of the full frame."""
        return self.top + self.size / 2, self.left + self.size / 2

    @property
    def category(self) -> str:
        """``shape``, ``digit`` or ``letter``."""
        return "shape" if self.kind in SHAPES else "digit" if self.kind in DIGITS else "letter"


@dataclass(frozen=True)
class Count:
    """A property whose number of objects was drawn evenly from 0 to 3: a colour or a plain shape."""

    value: str
    number: int


@dataclass(frozen=True)
class Scene:
    """Objects in a window of ``cells`` by ``cells``, whose first cell stands in row and column ``origin``."""

    objects: tuple[Object, ...]
    counted: Count
    cells: int = FRAME_CELLS
    origin: tuple[int, int] = (0, 0)


def make_scene(numbers: random.Random, cells: int = FRAME_CELLS) -> Scene:
    """Draws a scene: 2 to 6 objects, half of them plain shapes, the others digits and letters.

    The number of objects is even over its range. One colour or one shape is chosen, and how many objects have it is
    even over 0 to 3 (0 to 2 where there are but two): counting cannot be guessed.

    Args:
        numbers: source of randomness; the same state gives the same scene.
        cells: side of the window, 2 to 4.
    """
    origin = (numbers.randrange(FRAME_CELLS - cells + 1), numbers.randrange(FRAME_CELLS - cells + 1))
    total = numbers.randrange(2, min(MOST_OBJECTS, cells * cells) + 1)
    value = numbers.choice(COLOUR_NAMES if numbers.random() < 0.5 else SHAPES)
    counted = Count(value, numbers.randrange(min(MOST_COUNTED, total) + 1))
    places = numbers.sample(range(cells * cells), total)
    objects = []
    for i, place in enumerate(places):
        kind, colour = _draw(numbers, counted, i < counted.number)
        size = numbers.choice(SIZES)
        steps = (CELL - size) // PATCH + 1
        row, column = origin[0] + place // cells, origin[1] + place % cells
        left = column * CELL + PATCH * numbers.randrange(steps)
        top = row * CELL + PATCH * numbers.randrange(steps)
        objects.append(Object(kind, colour, left, top, size))
    return Scene(tuple(objects), counted, cells, origin)


def _draw(numbers: random.Random, counted: Count, has: bool) -> tuple[str, str]:
    """Kind and colour of one object, with or without the counted property."""
    colour = numbers.choice(COLOUR_NAMES)
    kind = numbers.choice(SHAPES if numbers.random() < 0.5 else DIGITS + LETTERS)
    if counted.value in COLOURS:
        colour = counted.value if has else numbers.choice([c for c in COLOUR_NAMES if c != counted.value])
    elif has:
        kind = counted.value
    elif kind in SHAPES:
        kind = numbers.choice([s for s in SHAPES if s != counted.value])
    return kind, colour


def paint(scene: Scene, numbers: random.Random) -> np.ndarray:
    """Paints the window of a scene: blocks of dim colours, specks in the objects' colours, objects, noise.

    Args:
        scene: what to paint.
        numbers: source of randomness.

    Returns:
        RGB ``[24 * cells, 24 * cells, 3]`` uint8.
    """
    side = scene.cells * CELL
    blocks = np.frombuffer(numbers.randbytes((side // _BLOCK) ** 2 * 3), np.uint8)
    blocks = blocks.reshape(side // _BLOCK, side // _BLOCK, 3) // 3 + 35
    canvas = blocks.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1).astype(np.int16)
    for _ in range(_SPECKS * scene.cells**2 // FRAME_CELLS**2):
        y, x, extent = numbers.randrange(side - 3), numbers.randrange(side - 3), numbers.choice((1, 2, 3))
        canvas[y : y + extent, x : x + extent] = COLOURS[numbers.choice(COLOUR_NAMES)]
    for thing in scene.objects:
        y, x = thing.top - scene.origin[0] * CELL, thing.left - scene.origin[1] * CELL
        shade = shade_of(thing.colour, numbers)
        box = canvas[y : y + thing.size, x : x + thing.size]
        if thing.category != "shape":
            box //= 2  # glyphs stand on a dark plate, as signs do
        box[mask(thing.kind, thing.size)] = shade
    return add_noise(canvas, numbers)


def shade_of(colour: str, numbers: random.Random) -> list[int]:
    """Red, green and blue of one object of a colour: no two are of quite the same shade."""
    return [value + numbers.randrange(-_COLOUR_JITTER, _COLOUR_JITTER + 1) for value in COLOURS[colour]]


def add_noise(canvas: np.ndarray, numbers: random.Random) -> np.ndarray:
    """``canvas`` ``[height, width, 3]`` int16 with noise of -16 to 15 in every value, as uint8."""
    noise = np.frombuffer(numbers.randbytes(canvas.size), np.uint8).reshape(canvas.shape)
    return np.clip(canvas + (noise.astype(np.int16) // 8 - 16), 0, 255).astype(np.uint8)


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch of the window shows, for losses on the vision tower.

    Returns:
        ``[patches, 3]`` int64: colour and kind, each counted from 1 with 0 for background, and 1 at the patch that
        holds an object's middle.
    """
    cell = CELL // PATCH
    side = scene.cells * cell
    labels = np.zeros((side, side, 3), np.int64)
    for thing in scene.objects:
        top, left = thing.top // PATCH - scene.origin[0] * cell, thing.left // PATCH - scene.origin[1] * cell
        extent = thing.size // PATCH
        labels[top : top + extent, left : left + extent, 0] = 1 + COLOUR_NAMES.index(thing.colour)
        labels[top : top + extent, left : left + extent, 1] = 1 + TYPES.index(thing.kind)
        labels[top + extent // 2, left + extent // 2, 2] = 1
    return labels.reshape(-1, 3)
