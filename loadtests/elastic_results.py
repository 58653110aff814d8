"""What the sweep of elastic budgets found: goodput of each setting at each rate, budgets chosen, accuracy at them."""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError
from loadtests.elastic_cells import ALL, ELASTIC, STOCK, Limits
from loadtests.measures import Ratio
from loadtests.records import Record
from loadtests.store import Store
from loadtests.tables import Table

_Z = 1.96


@dataclass(frozen=True)
class Run:
    """One cell: requests due in its window that kept the limits, of all that were due, and the budgets given."""

    multiple: float
    rate: float
    arm: str
    repeat: int
    seconds: float
    met: int
    due: int
    budgets: dict[str, float]


class ElasticResults:
    """A results' folder."""

    def __init__(self, folder: Path, slo_scale: float | None = None) -> None:
        """Reads all of it; ``slo_scale`` where goodput is to be counted by other limits than the sweep's.

        Raises:
            SettingError: no such results, or no cell of a rate is measured.
        """
        store = Store(folder)
        raw = store.sweep()
        self.settings: dict[str, Any] = raw["settings"]
        self.sessions: list[dict[str, Any]] = raw["sessions"]
        cells, scale = store.cells(), slo_scale or self.settings["slo_scale"]
        rates = [cell for cell in cells if cell["key"].startswith("rate/")]
        self.limits = {repeat: Limits.of(store, scale, repeat) for repeat in sorted({cell["repeat"] for cell in rates})}
        self.runs = [self._run(cell) for cell in rates]
        self.marks = {cell["budget"]: _marks(cell) for cell in cells if cell["key"].startswith("accuracy/")}
        if not self.runs:
            raise SettingError(
                "results", folder.name, "no rate is measured yet", "let loadtests.elastic_sweep run first"
            )

    def _run(self, cell: dict[str, Any]) -> Run:
        records, limits = [Record.from_dict(values) for values in cell["requests"]], self.limits[cell["repeat"]]
        due = limits.due(records, cell["client"])
        window = cell["client"]["window"]
        return Run(
            **{name: cell[name] for name in ("multiple", "rate", "arm", "repeat")},
            seconds=window["closed"] - window["opened"],
            met=sum(limits.met(record) for record in due),
            due=len(due),
            budgets=cell["metrics"]["budgets"],
        )

    @cached_property
    def multiples(self) -> list[float]:
        """Rates that were measured, over stock's capacity."""
        return sorted({run.multiple for run in self.runs})

    @cached_property
    def fixed(self) -> tuple[str, str]:
        """Names of ceiling and floor, which are settings, too."""
        low, _, high = self.settings["elastic"].partition(":")
        return high, low

    @property
    def arms(self) -> tuple[str, ...]:
        """All settings."""
        return (STOCK, *self.fixed, ELASTIC)

    def of(self, multiple: float, arm: str) -> list[Run]:
        """The repeats of a cell."""
        return [run for run in self.runs if (run.multiple, run.arm) == (multiple, arm)]

    def rate(self, multiple: float) -> float:
        """Requests per second that arrive, mean over repeats."""
        return statistics.fmean({run.repeat: run.rate for run in self.runs if run.multiple == multiple}.values())

    def goodput(self, multiple: float, arm: str) -> float | None:
        """Requests per second that kept the limits, over all repeats; None where nothing is measured."""
        runs = self.of(multiple, arm)
        return sum(run.met for run in runs) / sum(run.seconds for run in runs) if runs else None

    def better(self, multiple: float) -> str | None:
        """The fixed budget with the higher goodput; that which keeps more where they are even."""
        found = {arm: self.goodput(multiple, arm) for arm in self.fixed}
        known = {arm: value for arm, value in found.items() if value is not None}
        return max(known, key=lambda arm: known[arm]) if known else None

    def over_better(self, multiple: float) -> Ratio | None:
        """Elastic's goodput over that of the better fixed budget, in paired repeats; None where one kept nothing."""
        best = self.better(multiple)
        ours = {run.repeat: run.met for run in self.of(multiple, ELASTIC)}
        theirs = {run.repeat: run.met for run in self.of(multiple, best)} if best else {}
        pairs = [(ours[repeat], theirs[repeat]) for repeat in ours if repeat in theirs]
        if not pairs or not all(a and b for a, b in pairs):
            return None
        ratio = Ratio.of([a / b for a, b in pairs])
        # Of all requests together: windows at low rates hold few.
        return Ratio(ratio.repeats, sum(a for a, _ in pairs) / sum(b for _, b in pairs), ratio.low, ratio.high)

    def shares(self, multiple: float, arm: str) -> dict[int, float]:
        """Share of requests that were given each budget."""
        if arm != ELASTIC:
            return {ALL if arm == STOCK else int(arm): 1.0}
        counts: dict[int, float] = {}
        for run in self.of(multiple, arm):
            for budget, count in run.budgets.items():
                counts[int(budget)] = counts.get(int(budget), 0.0) + count
        total = sum(counts.values())
        return {budget: count / total for budget, count in counts.items()}

    def accuracy(self, shares: dict[int, float]) -> tuple[float, float] | None:
        """Share of right answers of the embedded model, and half of its 95 % interval, at budgets in these shares.

        None where nothing was chosen.

        Raises:
            SettingError: the accuracy at one of them is not measured.
        """
        return self.accuracy_gain(shares, {})

    def accuracy_gain(self, shares: dict[int, float], less: dict[int, float]) -> tuple[float, float] | None:
        """As :meth:`accuracy`, less that at budgets in other shares, question by question."""
        if not shares:
            return None
        for budget in {*shares, *less}:
            if budget not in self.marks:
                remedy = "let the sweep run to its end"
                raise SettingError("results", budget, "the accuracy at this budget is not measured", remedy)
        asked = sorted(set.intersection(*(set(self.marks[budget]) for budget in {*shares, *less})))
        signed = [*shares.items(), *((budget, -share) for budget, share in less.items())]
        gains = [sum(share * self.marks[budget][number] for budget, share in signed) for number in asked]
        return statistics.fmean(gains), _Z * statistics.stdev(gains) / math.sqrt(len(gains))


def _marks(cell: dict[str, Any]) -> dict[int, bool]:
    return {r["number"]: bool(r["right"]) for r in cell["requests"] if "right" in r}


def tables(results: ElasticResults) -> list[Table]:
    """Goodput of the one model, and accuracy of the other at the budgets that were chosen."""
    return [goodput_table(results), accuracy_table(results)]


def goodput_table(results: ElasticResults) -> Table:
    """Rates down, settings across."""
    rows = []
    for multiple in results.multiples:
        cells = [results.goodput(multiple, arm) for arm in results.arms]
        ratio, shares = results.over_better(multiple), results.shares(multiple, ELASTIC)
        mean = sum(budget * share for budget, share in shares.items())
        rows.append(
            (
                f"{multiple:g} ({results.rate(multiple):.2f}/s)",
                *("-" if value is None else f"{value:.2f}" for value in cells),
                "-" if ratio is None else str(ratio),
                f"{mean:.0f}" if shares else "-",
            )
        )
    subject, repeats = results.settings["subject"], max(run.repeat for run in results.runs)
    seconds = f"{results.settings['seconds']:g} s"
    said = f"Up to {repeats} windows of {seconds}, before each of which stock was measured anew; in brackets the 95 % "
    said += "interval over them."
    if repeats == 1:
        said = f"One window of {seconds} for each, so that there is no interval."
    head = ("arrivals over stock's capacity", *results.arms, "elastic over the better fixed", "mean budget chosen")
    return Table(
        f"Good requests per second ({subject['name']}; profile {subject['profile_name']})",
        head,
        tuple(rows),
        f"Good: {'; '.join(map(str, results.limits.values()))}, from when it was due "
        f"({results.settings['slo_scale']:g} times stock's medians without load). {said}",
    )


def accuracy_table(results: ElasticResults) -> Table:
    """Rates down, settings across."""
    rows, least = [], min(results.fixed, key=int)
    for multiple in results.multiples:
        found = [results.accuracy(results.shares(multiple, arm)) for arm in results.arms]
        found.append(results.accuracy_gain(results.shares(multiple, ELASTIC), results.shares(multiple, least)))
        rows.append((f"{multiple:g}", *("-" if f is None else f"{100 * f[0]:.1f} ± {100 * f[1]:.1f}" for f in found)))
    judge, asked = results.settings["judge"], len(next(iter(results.marks.values())))
    return Table(
        f"Right answers in percent, at those budgets ({judge['name']}; profile {judge['profile_name']})",
        ("arrivals over stock's capacity", *results.arms, f"elastic minus {least}"),
        tuple(rows),
        f"The embedded model over HTTP, the same {asked} questions at each budget, weighed by how often the other "
        "model's server chose it. The model above has random weights: its answers mean nothing.",
    )
