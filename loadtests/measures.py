"""Measures that figures are made of: goodput limits, percentiles, and intervals of ratios over repeats."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eos_vllm.core.errors import SettingError
from loadtests.records import Record

# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; a series serves beyond.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z975 = 1.95996
# Repeats from which on an interval that holds 1 means "no difference seen".
ENOUGH = 5
# Ratios so near to 1 are repeated until there are enough.
CLOSE = (0.9, 1.1)


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good: most seconds to the first token and per output token; None: any."""

    ttft: float | None = None
    tpot: float | None = None

    def met(self, record: Record) -> bool:
        """Whether an answered request kept it, its first token counted from when it was due.

        An answer of one token has no time per output token to break.
        """
        if not record.good or record.from_due is None:
            return False
        if self.ttft is not None and record.from_due > self.ttft:
            return False
        return self.tpot is None or record.tpot is None or record.tpot <= self.tpot

    def __str__(self) -> str:
        parts = [f"{name} ≤ {seconds:.3g} s" for name, seconds in (("TTFT", self.ttft), ("TPOT", self.tpot)) if seconds]
        return ", ".join(parts) or "none"


# The one limit for all settings, scenarios and loads, whatever stock reaches in them: an answer that begins within 5 s
# and comes at two tokens a second or more, about what one puts up with on two CPU cores. On a GPU give --slo.
SLO = Slo(ttft=5.0, tpot=0.5)


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


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (to 0.002), for a 95 % interval on both sides."""
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True)
class Ratio:
    """eos over stock from paired repeats, above 1 where eos is better.

    Attributes:
        repeats: pairs.
        mean: geometric mean.
        low, high: 95 % interval (t, on logarithms); None with one pair.
    """

    repeats: int
    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        """From the ratio of each pair, all above 0; at least one."""
        logs = [math.log(value) for value in values]
        mean = statistics.fmean(logs)
        if len(logs) < 2:
            return cls(1, math.exp(mean), None, None)
        half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(len(logs), math.exp(mean), math.exp(mean - half), math.exp(mean + half))

    @property
    def verdict(self) -> str:
        """``slower``, ``faster``, ``no difference`` or ``not decided``.

        An interval beside 1 decides. One that holds 1 does with five repeats or more. With fewer, a ratio well above 1
        counts as faster; everything else is not decided.
        """
        if self.low is not None and self.high is not None:
            if self.high < 1:
                return "slower"
            if self.low > 1:
                return "faster"
            if self.repeats >= ENOUGH:
                return "no difference"
        return "faster" if self.mean > CLOSE[1] and self.repeats < ENOUGH else "not decided"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"
