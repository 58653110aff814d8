"""Measures that figures are made of: goodput limits, percentiles, intervals of shares, and the spread of repeats."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eos_vllm.core.errors import SettingError
from loadtests.records import Record

_Z95 = 1.959964


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good: most seconds to the first token and per output token; None: any."""

    ttft: float | None = None
    tpot: float | None = None

    def met(self, record: Record) -> bool:
        """Whether an answered request kept it; an answer of one token has no time per output token to break."""
        if not record.good or record.ttft is None:
            return False
        if self.ttft is not None and record.ttft > self.ttft:
            return False
        return self.tpot is None or record.tpot is None or record.tpot <= self.tpot

    def __str__(self) -> str:
        parts = [f"{name} ≤ {seconds:.3g} s" for name, seconds in (("TTFT", self.ttft), ("TPOT", self.tpot)) if seconds]
        return ", ".join(parts) or "none"


def parse_slo(text: str) -> Slo:
    """``ttft:2000,tpot:100``, in milliseconds as ``vllm bench serve --goodput`` takes them.

    Raises:
        SettingError: another name, or no positive number.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            limits[name.strip()] = float(value) / 1000
        except ValueError:
            raise SettingError("slo", part, "it has no number", "give ttft:2000,tpot:100 (milliseconds)") from None
        if name.strip() not in ("ttft", "tpot") or not limits[name.strip()] > 0:
            raise SettingError("slo", part, "no such limit", "give ttft:2000,tpot:100 (milliseconds)")
    return Slo(**limits)


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value below which ``share`` percent lie, linear between neighbours; None of nothing."""
    listed = list(values)
    return float(np.percentile(listed, share)) if listed else None


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson); of nothing it is everything."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, _Z95 * _Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def relative_range(values: Sequence[float]) -> float:
    """Range over median; 0 of fewer than two values."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 and min(values) > 0 else 0.0
