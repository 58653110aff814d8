"""A sweep's raw results, read: groups of cells, and paired ratios of eos to stock with their verdicts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError
from loadtests.figures import Cell, Group, groups_of
from loadtests.grid import RESTRICTED, SCENARIOS, STOCK, Load
from loadtests.measures import CLOSE, SLO, Ratio, Slo
from loadtests.store import Store

# Scenarios whose later questions are about an image that has been shown: (scenario, questions after the first).
LATER = {"multi_turn": (2, 3)}

_CLEAR = 3


@dataclass(frozen=True)
class Comparison:
    """eos against stock in one scenario under one load.

    ``figure`` is ``requests/s``, or ``TTFT`` of the question that ``question`` counts from 1; ratios are above 1 where
    eos is better, so that of TTFT is stock's median over eos's.
    """

    scenario: str
    load: Load
    setting: str
    figure: str
    question: int | None
    ratio: Ratio

    @property
    def name(self) -> str:
        """For people."""
        what = self.figure if self.question is None else f"{self.figure} of question {self.question}"
        return f"{self.scenario}, {self.load.label}, budget {self.setting}: {what}"


class Results:
    """What is in a results' folder."""

    def __init__(self, folder: Path, slo: Slo = SLO) -> None:
        """Reads all of it; ``slo`` are the limits of goodput.

        Raises:
            SettingError: the folder holds no sweep, or no cell.
        """
        store = Store(folder)
        raw = store.sweep()
        self.settings: dict[str, Any] = raw["settings"]
        self.sessions: list[dict[str, Any]] = raw["sessions"]
        try:
            self.cells = [Cell.from_dict(cell) for cell in store.cells()]
        except (KeyError, TypeError) as e:
            problem = f"its cells have another form ({type(e).__name__}: {e})"
            raise SettingError("results", folder.name, problem, "measure anew with this version") from None
        if not self.cells:
            raise SettingError("results", folder.name, "no cell is measured yet", "let loadtests.sweep run first")
        self.cells.sort(key=lambda cell: cell.started)
        self.groups = groups_of(self.cells)
        self.slo = slo

    @cached_property
    def subject(self) -> str:
        """The one model and profile of all rows."""
        subject = self.settings["subject"]
        return f"{subject['name']}; profile {subject['profile_name']}"

    @cached_property
    def scenarios(self) -> list[str]:
        """Those that were measured, in the order of the sweep."""
        found = {group.scenario for group in self.groups}
        return [name for name in SCENARIOS if name in found]

    @cached_property
    def loads(self) -> list[Load]:
        """Lightest first."""
        return sorted({group.load for group in self.groups}, key=lambda load: (load.rate or 0, load.concurrency))

    @cached_property
    def order(self) -> list[str]:
        """Stock, then budgets from the largest down."""
        found = {group.setting for group in self.groups}
        budgets = sorted((s for s in found if s.isdigit()), key=int, reverse=True)
        return [name for name in (STOCK, RESTRICTED) if name in found] + budgets

    @property
    def budgets(self) -> list[str]:
        """The eos settings."""
        return [name for name in self.order if name.isdigit()]

    def group(self, scenario: str, load: Load, setting: str) -> Group | None:
        """The repeats of one setting, None if none is measured."""
        wanted = (scenario, load, setting)
        return next((g for g in self.groups if (g.scenario, g.load, g.setting) == wanted), None)

    def ratio(self, scenario: str, load: Load, setting: str, question: int | None = None) -> Ratio | None:
        """Requests per second against stock's, or with ``question`` stock's median TTFT of it against eos's.

        None where no repeat has both.
        """
        ours, stock = self.group(scenario, load, setting), self.group(scenario, load, STOCK)
        if ours is None or stock is None:
            return None
        if question is None:
            top, bottom = ours.by_repeat(lambda g: g.rate), stock.by_repeat(lambda g: g.rate)
        else:
            top = stock.by_repeat(lambda g: g.ttft(50, question))
            bottom = ours.by_repeat(lambda g: g.ttft(50, question))
        pairs = [top[repeat] / bottom[repeat] for repeat in top if repeat in bottom]
        return Ratio.of(pairs) if pairs else None

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All ratios of budgets to stock: requests per second, and TTFT of later turns."""
        found = []
        for scenario in self.scenarios:
            for load in self.loads:
                for setting in self.budgets:
                    for question in (None, *LATER.get(scenario, ())):
                        ratio = self.ratio(scenario, load, setting, question)
                        figure = "requests/s" if question is None else "TTFT"
                        if ratio is not None:
                            found.append(Comparison(scenario, load, setting, figure, question, ratio))
        return found

    def close(self, settings: Collection[str], before: int) -> set[tuple[str, Load, str]]:
        """Settings that need another repeat: some ratio of the repeats below ``before`` is near to 1, or below.

        One that is clearly below by three repeats needs no more of them.
        """
        earlier = self._only([cell for cell in self.cells if cell.repeat < before])
        return {
            (c.scenario, c.load, c.setting)
            for c in earlier.comparisons
            if c.setting in settings and c.ratio.mean <= CLOSE[1] and not _clearly_slower(c.ratio)
        }

    def _only(self, cells: Sequence[Cell]) -> "Results":
        other = object.__new__(Results)
        other.settings, other.sessions, other.slo = self.settings, self.sessions, self.slo
        other.cells, other.groups = list(cells), groups_of(cells)
        return other


def _clearly_slower(ratio: Ratio) -> bool:
    return ratio.repeats >= _CLEAR and ratio.mean < CLOSE[0] and ratio.verdict == "slower"
