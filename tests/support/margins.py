"""How near to a tie a plain selector decides: below :data:`MARGIN` float32 may decide otherwise than float64."""

import math
from collections.abc import Iterable
from typing import Any

import pytest

from eos_vllm.analysis import plain_selectors

# As a share of the largest value.
MARGIN = 1e-5


def record_margins(patch: pytest.MonkeyPatch) -> list[float]:
    """By how much each decision of a plain rule is taken, relative to the largest value it chooses from."""
    margins = [math.inf]

    def record(name: str, cuts: Any) -> None:
        decide = getattr(plain_selectors, name)

        def recorded(values: Any, among: Iterable[int], *count: int) -> Any:
            among = list(among)
            ordered = sorted((float(values[j]) for j in among), reverse=True)
            size = max((abs(value) for value in ordered), default=0.0) or 1.0
            cut_at = [cut for cut in cuts(len(ordered), *count) if 0 < cut < len(ordered)]
            margins.extend((ordered[cut - 1] - ordered[cut]) / size for cut in cut_at)
            return decide(values, among, *count)

        patch.setattr(plain_selectors, name, recorded)

    record("_highest", lambda _: [1])
    record("_ranked", range)
    record("_best", lambda _, count: [count])
    return margins
