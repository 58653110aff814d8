"""Masks of the objects: four plain shapes, ten digits and six letters, from bitmaps, the same on every machine.

No font and no drawing library takes part: their rendering differs between versions.
"""

from functools import cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
LETTERS = tuple("ACHKTX")
TYPES = SHAPES + DIGITS + LETTERS

# Five columns by seven rows, one string of 35 cells each.
_BITMAPS = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "#..#. #..#. #..#. ##### ...#. ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}


@cache
def mask(kind: str, size: int) -> np.ndarray:
    """Which pixels of a ``size`` by ``size`` box the object covers, ``[size, size]`` bool, read-only.

    Args:
        kind: one of ``TYPES``.
        size: pixels, 8 or more.
    """
    drawn = _shape(kind, size) if kind in SHAPES else _glyph(kind, size)
    drawn.setflags(write=False)
    return drawn


def _shape(kind: str, size: int) -> np.ndarray:
    # Twice the distance of each pixel's centre from the middle: whole numbers, so that no rounding is involved.
    offsets = 2 * np.arange(size) - (size - 1)
    y, x = offsets[:, None], offsets[None, :]
    if kind == "circle":
        return y * y + x * x <= size * size
    if kind == "square":
        return np.maximum(abs(y), abs(x)) <= size - 3
    if kind == "triangle":
        return 2 * abs(x) <= y + size
    arm = size // 3
    return (abs(x) <= arm) | (abs(y) <= arm)


def _glyph(kind: str, size: int) -> np.ndarray:
    cells = np.array([[cell == "#" for cell in row] for row in _BITMAPS[kind].split()])
    rows = np.arange(size) * cells.shape[0] // size
    columns = np.arange(size) * cells.shape[1] // size
    return cells[rows][:, columns]
