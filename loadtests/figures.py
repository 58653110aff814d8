"""Figures of cells from their raw records: rates and latencies of the steady part, goodput, lateness, failures."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.grid import Load
from loadtests.measures import Slo, percentile
from loadtests.records import Record


@dataclass(frozen=True)
class Steady:
    """The part of a run that counts: from ``opened`` to ``closed``, seconds on the run's clock.

    A run without a window counts whole: from the first request sent to the last token.
    """

    records: tuple[Record, ...]
    opened: float
    closed: float

    @classmethod
    def of(cls, records: Sequence[Record], client: dict[str, Any]) -> "Steady":
        """The window that the client noted, or the whole run."""
        window = client.get("window")
        if window is not None:
            # A run that ended before its window did has nothing to count.
            opened = window["opened"] if window["opened"] is not None else 0.0
            return cls(tuple(records), opened, opened if window["closed"] is None else window["closed"])
        ends = [record.finished for record in records if record.good]
        starts = [record.started for record in records]
        return cls(tuple(records), min(starts, default=0.0) - 1e-9 if ends else 0.0, max(ends, default=0.0))

    @property
    def answered(self) -> list[Record]:
        """Requests whose last token came within."""
        return [r for r in self.records if r.good and self.opened < r.finished <= self.closed]

    @property
    def full(self) -> list[Record]:
        """Those of them that no ramp shortened."""
        return [record for record in self.answered if not record.starter]

    @property
    def begun(self) -> list[Record]:
        """Unshortened requests whose first token came within, those cut off later included."""
        return [
            r
            for r in self.records
            if (r.good or r.cut) and not r.starter and r.ttft is not None and self._within(r.started + r.ttft)
        ]

    def _within(self, moment: float) -> bool:
        return self.opened < moment <= self.closed

    @property
    def requests_per_second(self) -> float:
        """Requests answered within, per second."""
        length = self.closed - self.opened
        return len(self.answered) / length if length > 0 else 0.0


@dataclass(frozen=True)
class Cell:
    """One raw cell, read."""

    scenario: str
    load: Load
    setting: str
    repeat: int
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
            scenario=raw["scenario"],
            load=Load(**raw["load"]),
            setting=raw["setting"],
            repeat=raw["repeat"],
            seed=raw["seed"],
            started=raw["started"],
            seconds=raw["seconds"],
            records=tuple(Record.from_dict(values) for values in raw["requests"]),
            metrics=raw["metrics"],
            client=raw["client"],
        )

    @property
    def steady(self) -> Steady:
        """What counts of it."""
        return Steady.of(self.records, self.client)

    @property
    def requests_per_second(self) -> float:
        """Requests answered in the window, per second."""
        return self.steady.requests_per_second

    def goodput(self, slo: Slo) -> float:
        """Requests per second that kept the limits."""
        full = self.steady.full
        return self.requests_per_second * sum(slo.met(r) for r in full) / len(full) if full else 0.0

    @property
    def failures(self) -> Counter[str]:
        """Failed requests by cause, in the ramp too."""
        return Counter(record.cause for record in self.records if record.cause is not None)


@dataclass(frozen=True)
class Group:
    """The repeats of one setting under one load in one scenario."""

    scenario: str
    load: Load
    setting: str
    cells: tuple[Cell, ...]

    @property
    def rate(self) -> float:
        """Requests per second: median of the repeats."""
        return statistics.median(cell.requests_per_second for cell in self.cells)

    def goodput(self, slo: Slo) -> float:
        """Requests per second that kept the limits: median of the repeats."""
        return statistics.median(cell.goodput(slo) for cell in self.cells)

    @property
    def full(self) -> list[Record]:
        """Unshortened answers of all repeats' windows."""
        return [record for cell in self.cells for record in cell.steady.full]

    def ttft(self, share: float, question: int | None = None, from_due: bool = False) -> float | None:
        """Percentile of the time to first token in seconds, of all questions of a visit or of one.

        ``from_due`` counts from when an open loop's request was due, not from when it was sent.
        """
        begun = [r for cell in self.cells for r in cell.steady.begun if question in (None, r.question)]
        moments = [r.from_due if from_due else r.ttft for r in begun]
        return percentile((m for m in moments if m is not None), share)

    def tpot(self, share: float) -> float | None:
        """Percentile of the time per output token after the first, in seconds."""
        return percentile((r.tpot for r in self.full if r.tpot is not None), share)

    def e2e(self, share: float) -> float | None:
        """Percentile of the time to the last token, in seconds."""
        return percentile((r.times[-1] for r in self.full if r.times), share)

    def late(self, share: float) -> float | None:
        """Percentile of how much later than due an open loop's visits were sent, in seconds."""
        first = (r.late for cell in self.cells for r in cell.steady.begun if r.question == 1)
        return percentile(first, share)

    def by_repeat(self, figure: Callable[["Group"], float | None]) -> dict[int, float]:
        """A figure of each repeat alone, where it has one above 0."""
        ones = {cell.repeat: figure(Group(self.scenario, self.load, self.setting, (cell,))) for cell in self.cells}
        return {repeat: value for repeat, value in ones.items() if value}


def groups_of(cells: Sequence[Cell]) -> list[Group]:
    """Cells by scenario, load and setting, in the order in which they first come."""
    found: dict[tuple[str, Load, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.scenario, cell.load, cell.setting), []).append(cell)
    return [
        Group(scenario, load, setting, tuple(sorted(members, key=lambda cell: cell.repeat)))
        for (scenario, load, setting), members in found.items()
    ]
