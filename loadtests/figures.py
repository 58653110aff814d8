"""Figures of cells from their raw records: rates, latencies, goodput, KV memory, agreement of client and server."""

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.measures import Slo, percentile
from loadtests.records import Record


@dataclass(frozen=True)
class Cell:
    """One raw cell, read."""

    phase: str
    repeat: int
    setting: str
    concurrency: int
    rate: float | None
    seed: int
    started: str
    seconds: float
    records: tuple[Record, ...]
    metrics: dict[str, Any]
    client: dict[str, Any]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Cell":
        """Reads what the sweep wrote."""
        return cls(
            phase=raw["phase"],
            repeat=raw["repeat"],
            setting=raw["setting"],
            concurrency=raw["load"]["concurrency"],
            rate=raw["load"]["rate"],
            seed=raw["seed"],
            started=raw["started"],
            seconds=raw["seconds"],
            records=tuple(Record.from_dict(values) for values in raw["requests"]),
            metrics=raw["metrics"],
            client=raw["client"],
        )

    @property
    def load(self) -> float:
        """Users of a closed loop, or arrivals per second of an open one."""
        return self.concurrency if self.rate is None else self.rate

    @property
    def good(self) -> list[Record]:
        """Requests that were answered in full."""
        return [record for record in self.records if record.good]

    @property
    def duration(self) -> float:
        """Seconds from the first request sent to the last token; 0 where nothing was answered."""
        good = self.good
        return max(r.finished for r in good) - min(r.started for r in self.records) if good else 0.0

    def per_second(self, count: float) -> float:
        """``count`` over the duration."""
        return count / self.duration if self.duration > 0 else 0.0

    @property
    def requests_per_second(self) -> float:
        """Requests answered in full, per second."""
        return self.per_second(len(self.good))

    def goodput(self, slo: Slo) -> float:
        """Those that kept the limits, per second."""
        return self.per_second(sum(slo.met(record) for record in self.records))

    @property
    def failures(self) -> Counter[str]:
        """Failed requests by cause."""
        return Counter(record.cause for record in self.records if record.cause is not None)

    def kv_per_request(self, block_bytes: int) -> float | None:
        """Bytes of KV memory per running request: mean over the looks at the server, each weighing its requests."""
        series, blocks = self.metrics["series"], self.metrics["blocks"]
        running = sum(series.get("running", ()))
        if blocks is None or not running or "kv_usage" not in series:
            return None
        busy = zip(series["kv_usage"], series["running"], strict=True)
        return sum(usage for usage, running_now in busy if running_now) * blocks * block_bytes / running

    @property
    def most_running(self) -> int | None:
        """Most requests seen running at once."""
        running = self.metrics["series"].get("running")
        return int(max(running)) if running else None

    @property
    def repeated_images(self) -> tuple[int, int]:
        """Images shown that the run had shown before, and all images shown."""
        meant = [record for record in self.records if record.fault is None]
        return sum(r.repeats for r in meant), sum(r.images for r in meant)

    def agreement(self) -> dict[str, tuple[float, float]]:
        """What client and server counted: answered requests, tokens out, tokens of prompts.

        Empty where the server counts nothing, or where requests were left or failed: a server counts their tokens,
        a client cannot.
        """
        rise = self.metrics["rise"]
        if len(self.good) != len(self.records) or "answered" not in rise:
            return {}
        return {
            "requests": (len(self.good), rise["answered"]),
            "tokens out": (sum(r.tokens_out or 0 for r in self.good), rise.get("generation_tokens", 0)),
            "prompt tokens": (sum(r.prompt_tokens or 0 for r in self.good), rise.get("prompt_tokens", 0)),
        }


@dataclass(frozen=True)
class Group:
    """The repeats of one setting under one load in one phase."""

    phase: str
    setting: str
    load: float
    cells: tuple[Cell, ...]

    @property
    def good(self) -> list[Record]:
        """Answered requests of all repeats."""
        return [record for cell in self.cells for record in cell.good]

    @property
    def rates(self) -> list[float]:
        """Requests per second of each repeat."""
        return [cell.requests_per_second for cell in self.cells]

    @property
    def rate(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.rates)

    def goodputs(self, slo: Slo) -> list[float]:
        """Goodput of each repeat."""
        return [cell.goodput(slo) for cell in self.cells]

    def ttft(self, share: float) -> float | None:
        """Percentile of the time to first token over all repeats' requests, in seconds."""
        return percentile((r.ttft for r in self.good if r.ttft is not None), share)

    def tpot(self, share: float) -> float | None:
        """Percentile of the time per output token over all repeats' requests, in seconds."""
        return percentile((r.tpot for r in self.good if r.tpot is not None), share)

    def itl(self, share: float) -> float | None:
        """Percentile of the inter-token latency, in seconds."""
        gaps = (later - earlier for r in self.good for earlier, later in itertools.pairwise(r.times))
        return percentile(gaps, share)

    def e2e(self, share: float) -> float | None:
        """Percentile of the time to the last token, in seconds."""
        return percentile((r.times[-1] for r in self.good if r.times), share)

    @property
    def marks(self) -> tuple[int, int]:
        """Right answers, and answers that could be marked."""
        marked = [record.right for record in self.good if record.right is not None]
        return sum(marked), len(marked)

    @property
    def prompt_tokens(self) -> float | None:
        """Mean tokens of a prompt by the server's count."""
        return statistics.fmean(r.prompt_tokens or 0 for r in self.good) if self.good else None

    def kv_per_request(self, block_bytes: int) -> float | None:
        """Mean of the cells' own."""
        found = [value for cell in self.cells if (value := cell.kv_per_request(block_bytes)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def most_running(self) -> int | None:
        """Most requests seen running at once in any repeat."""
        return max((cell.most_running for cell in self.cells if cell.most_running is not None), default=None)


def groups_of(cells: Sequence[Cell]) -> list[Group]:
    """Cells by phase, load and setting, in the order in which they first come."""
    found: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.phase, cell.setting, cell.load), []).append(cell)
    return [
        Group(phase, setting, load, tuple(sorted(members, key=lambda cell: cell.repeat)))
        for (phase, setting, load), members in found.items()
    ]


def ratios(group: Group, stock: Group) -> list[float]:
    """Requests per second against stock's in the same repeat; repeats that only one of them has are left out."""
    rates = {cell.repeat: cell.requests_per_second for cell in stock.cells}
    return [c.requests_per_second / rates[c.repeat] for c in group.cells if rates.get(c.repeat)]
