"""The picture made smaller, then all of its patches: the baseline that beats many methods (VTC-Bench, 2510.07143)."""

import math
from typing import Literal

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import TowerOutput


class Resize(Selector):
    """The largest square of patches that the count holds; the tower itself sees fewer pixels.

    The host shrinks the pixels, and the tower's table of positions is interpolated, in front of the tower.
    """

    rule: Literal["resize"] = "resize"

    def count(self, keep: int, total: int) -> int:
        """The largest square of at most ``keep``."""
        return keep if keep >= total else math.isqrt(keep) ** 2

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """Never asked: the tower has given ``keep`` patches already."""
        raise RuntimeError("resize works in front of the tower")
