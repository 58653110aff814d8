"""Scenes of version 2: shapes of one or two patches and strings of characters, sparse or dense, on tinted clutter.

The frame is LLaVA-1.5's own: 336 pixels a side, 24x24 patches of 14. A window of fewer cells (6x6 patches each) is a
cut-out of it, as in version 1. Of a shape's or a character's patches every one is needed, and no other shows it.
"""

import random
from dataclasses import dataclass

import numpy as np

from eos_vllm.cluttervqa.glyphs import DIGITS, LETTERS, SHAPES, mask
from eos_vllm.cluttervqa.scene import COLOUR_NAMES, COLOURS, FRAME_CELLS, Count, Object, Scene, add_noise, shade_of

PATCH = 14
CELL = 6 * PATCH
GLYPH = 12  # pixels a side of every shape and character: strokes of 2 pixels, and all masks differ clearly
FILLS = ("solid", "hollow")
CODE, NUMBER = "code", "number"
CHARACTERS = LETTERS + DIGITS
TYPES = tuple(f"{fill} {shape}" for fill in FILLS for shape in SHAPES) + CHARACTERS
TINTS = {"red": (34, 0, 0), "green": (0, 34, 0), "blue": (0, 0, 34), "yellow": (34, 34, 0)}
ORDERS = 12  # labels of a character's place in its string
CODE_LENGTHS, NUMBER_LENGTHS = (3, 4, 5, 6), (2, 3, 4)
MOST_COUNTED = 3
# Shapes and strings, fewest and most, by the window's cells. At most 14 * 2 + 3 * 6 = 46 patches show anything: all of
# it fits into 64 tokens.
_SPARSE = ((3, 5), (1, 2))
_DENSE = {2: ((5, 7), (2, 2)), 3: ((7, 10), (2, 3)), 4: ((9, 14), (3, 3))}
_DOMINANCE = 0.5
_SPECKS = 60
_BLOCK = 28
_HOLE = 4


@dataclass(frozen=True)
class Thing(Object):
    """A shape, solid or hollow, or a string (kind ``code`` or ``number``) with one character per patch."""

    fill: str = FILLS[0]
    text: str = ""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        width = self.size + PATCH * max(0, len(self.text) - 1)
        return self.left, self.top, self.left + width, self.top + self.size

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column of the middle, in pixels of the full frame."""
        left, top, right, bottom = self.box
        return (top + bottom) / 2, (left + right) / 2

    @property
    def category(self) -> str:
        """``shape``, ``code`` or ``number``."""
        return self.kind if self.text else "shape"

    @property
    def patches(self) -> tuple[tuple[int, int], ...]:
        """Row and column in the full frame of every patch that shows it, in raster order; each character has one."""
        left, top, right, bottom = self.box
        rows, columns = range(top // PATCH, (bottom - 1) // PATCH + 1), range(left // PATCH, (right - 1) // PATCH + 1)
        return tuple((row, column) for row in rows for column in columns)


@dataclass(frozen=True)
class SmallScene(Scene):
    """A scene of version 2.

    Attributes:
        tint: colour of the background, one of ``TINTS``.
        frequent: the property, ``colour`` or ``shape``, of which one value may prevail; counting asks for the other.
    """

    objects: tuple[Thing, ...]
    tint: str = "red"
    frequent: str = "colour"

    @property
    def shapes(self) -> list[Thing]:
        """All but strings."""
        return [thing for thing in self.objects if not thing.text]

    @property
    def strings(self) -> list[Thing]:
        """Codes and numbers; no two are of one colour."""
        return [thing for thing in self.objects if thing.text]


def make_scene(numbers: random.Random, cells: int = FRAME_CELLS) -> SmallScene:
    """Draws a scene, sparse or dense alike: 3 to 14 shapes, 1 to 3 strings, apart from one another where there is room.

    How many shapes have one colour or one kind is even over 0 to 3; of the other property one value often prevails.
    A second string often is a near-duplicate of the first: one character differs.

    Args:
        numbers: source of randomness; the same state gives the same scene.
        cells: side of the window, 2 to 4.
    """
    origin = (numbers.randrange(FRAME_CELLS - cells + 1), numbers.randrange(FRAME_CELLS - cells + 1))
    (fewest, most), (few_strings, many_strings) = _DENSE[cells] if numbers.random() < 0.5 else _SPARSE
    total = numbers.randrange(fewest, most + 1)
    by_colour = numbers.random() < 0.5
    counted = Count(numbers.choice(COLOUR_NAMES if by_colour else SHAPES), numbers.randrange(MOST_COUNTED + 1))
    prevailing = numbers.choice(SHAPES if by_colour else COLOUR_NAMES)
    taken = np.zeros((6 * cells, 6 * cells), bool)
    things = _strings(numbers, taken, origin, numbers.randrange(few_strings, many_strings + 1))
    for i in range(total):
        kind, colour = _draw(numbers, counted, i < counted.number, prevailing)
        # One patch, or two of which each shows half.
        across = numbers.choice((None, 0, 1, None))
        left, top = (numbers.randrange(7, 10) if across == axis else numbers.randrange(3) for axis in (0, 1))
        row, column = _place(numbers, taken, 1 + (across == 1), 1 + (across == 0))
        left, top = left + origin[1] * CELL + column * PATCH, top + origin[0] * CELL + row * PATCH
        things.append(Thing(kind, colour, left, top, GLYPH, numbers.choice(FILLS)))
    tint = numbers.choice(tuple(TINTS))
    return SmallScene(tuple(things), counted, cells, origin, tint, "shape" if by_colour else "colour")


def _strings(numbers: random.Random, taken: np.ndarray, origin: tuple[int, int], count: int) -> list[Thing]:
    found: list[Thing] = []
    for i, colour in enumerate(numbers.sample(COLOUR_NAMES, count)):
        kind = numbers.choice((CODE, NUMBER))
        if i and numbers.random() < 0.5:
            kind, text = found[0].kind, found[0].text
            place = numbers.randrange(len(text))
            others = [c for c in _characters(kind, place) if all(c != thing.text[place : place + 1] for thing in found)]
            text = text[:place] + numbers.choice(others) + text[place + 1 :]
        else:
            length = numbers.choice(CODE_LENGTHS if kind == CODE else NUMBER_LENGTHS)
            text = "".join(numbers.choice(_characters(kind, place)) for place in range(length))
        row, column = _place(numbers, taken, 1, len(text))
        left = origin[1] * CELL + column * PATCH + numbers.randrange(3)
        top = origin[0] * CELL + row * PATCH + numbers.randrange(3)
        found.append(Thing(kind, colour, left, top, GLYPH, text=text))
    return found


def _characters(kind: str, place: int) -> tuple[str, ...]:
    """Characters that a string may have at a place: a code starts with a letter, a number not with 0."""
    if kind == CODE:
        return CHARACTERS if place else LETTERS
    return DIGITS if place else DIGITS[1:]


def _draw(numbers: random.Random, counted: Count, has: bool, prevailing: str) -> tuple[str, str]:
    """Kind and colour of one shape, with or without the counted property."""
    kind, colour = numbers.choice(SHAPES), numbers.choice(COLOUR_NAMES)
    prevails = numbers.random() < _DOMINANCE
    if counted.value in COLOURS:
        colour = counted.value if has else numbers.choice([c for c in COLOUR_NAMES if c != counted.value])
        return (prevailing if prevails else kind), colour
    kind = counted.value if has else numbers.choice([s for s in SHAPES if s != counted.value])
    return kind, (prevailing if prevails else colour)


def _place(numbers: random.Random, taken: np.ndarray, rows: int, columns: int) -> tuple[int, int]:
    """Takes free patches of the window, apart from all that are taken if it can be: row and column of the first."""
    near = taken.copy()
    near[1:] |= taken[:-1]
    near[:-1] |= taken[1:]
    wide = near.copy()
    wide[:, 1:] |= near[:, :-1]
    wide[:, :-1] |= near[:, 1:]
    for blocked in (wide, taken):
        height, width = blocked.shape[0] - rows + 1, blocked.shape[1] - columns + 1
        fits = np.ones((height, width), bool)
        for y in range(rows):
            for x in range(columns):
                fits &= ~blocked[y : y + height, x : x + width]
        if len(places := np.flatnonzero(fits)):
            row, column = divmod(int(places[numbers.randrange(len(places))]), width)
            taken[row : row + rows, column : column + columns] = True
            return row, column
    # 26 patches of 144 are the most that is ever taken.
    raise AssertionError("a window without room")


def thing_mask(kind: str, fill: str = FILLS[0]) -> np.ndarray:
    """Which of 12 by 12 pixels a shape or character covers, ``[12, 12]`` bool; what is hollow has a hole of 4 by 4."""
    drawn = mask(kind, GLYPH)
    if fill == FILLS[0]:
        return drawn
    top, left = (6 if kind == "triangle" else 4), 4
    drawn = drawn.copy()
    drawn[top : top + _HOLE, left : left + _HOLE] = False
    return drawn


def paint(scene: SmallScene, numbers: random.Random) -> np.ndarray:
    """Paints the window of a scene: tinted blocks, specks in the objects' colours, shapes, strings on plates, noise.

    Args:
        scene: what to paint.
        numbers: source of randomness.

    Returns:
        RGB ``[84 * cells, 84 * cells, 3]`` uint8.
    """
    side = scene.cells * CELL
    blocks = np.frombuffer(numbers.randbytes((side // _BLOCK) ** 2 * 3), np.uint8)
    tinted = blocks.reshape(side // _BLOCK, side // _BLOCK, 3) // 6 + 28 + np.array(TINTS[scene.tint], np.int16)
    canvas = tinted.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1).astype(np.int16)
    for _ in range(_SPECKS * scene.cells**2 // FRAME_CELLS**2):
        y, x, extent = numbers.randrange(side - 4), numbers.randrange(side - 4), numbers.choice((2, 3, 4))
        canvas[y : y + extent, x : x + extent] = COLOURS[numbers.choice(COLOUR_NAMES)]
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        y, x = top - scene.origin[0] * CELL, left - scene.origin[1] * CELL
        shade = shade_of(thing.colour, numbers)
        box = canvas[y : y + bottom - top, x : x + right - left]
        if not thing.text:
            box[thing_mask(thing.kind, thing.fill)] = shade
            continue
        box //= 2
        for place, character in enumerate(thing.text):
            box[:, place * PATCH : place * PATCH + GLYPH][thing_mask(character)] = shade
    return add_noise(canvas, numbers)


def patch_labels(scene: SmallScene) -> np.ndarray:
    """What each patch of the window shows, for losses on the vision tower.

    Returns:
        ``[patches, 4]`` int64: colour, and place in ``TYPES``, each counted from 1 with 0 for background; 1 at the
        first patch of every object; of a string's character in place n (from 0) 1 + 2 n, and 1 more of its last.
    """
    side = 6 * scene.cells
    labels = np.zeros((side, side, 4), np.int64)
    for thing in scene.objects:
        for place, (row, column) in enumerate(thing.patches):
            shown = thing.text[place] if thing.text else f"{thing.fill} {thing.kind}"
            patch = labels[row - 6 * scene.origin[0], column - 6 * scene.origin[1]]
            patch[:3] = 1 + COLOUR_NAMES.index(thing.colour), 1 + TYPES.index(shown), not place
            patch[3] = 1 + 2 * place + (place + 1 == len(thing.text)) if thing.text else 0
    return labels.reshape(-1, 4)


def scene_labels(scene: SmallScene) -> np.ndarray:
    """What the whole window shows, for a loss on the tower's CLS token.

    Returns:
        ``[34]`` float32 of 0 and 1: each colour and shape together, each colour of a string, each tint.
    """
    shapes = {(thing.colour, thing.kind) for thing in scene.shapes}
    strings = {thing.colour for thing in scene.strings}
    there = [(colour, shape) in shapes for colour in COLOUR_NAMES for shape in SHAPES]
    there += [colour in strings for colour in COLOUR_NAMES] + [tint == scene.tint for tint in TINTS]
    return np.array(there, np.float32)
