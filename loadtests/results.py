"""A sweep's raw results, read: groups of cells, what the plan promised them, and the verdicts that figures allow."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.geometry import ModelGeometry
from loadtests.figures import Cell, Group, groups_of
from loadtests.grid import STOCK
from loadtests.measures import Slo, relative_range
from loadtests.promise import Promise, promise
from loadtests.store import Store
from loadtests.sweep_options import ACCURACY

# The default goodput limits: so many times what a lone request takes in stock vLLM.
SLO_FACTOR = 5.0
_PHASE_TITLES = {"large": "KV cache large", "bound": "KV cache bound", "given": "servers as given"}


@dataclass(frozen=True)
class Verdict:
    """eos against stock in one setting under one load.

    Attributes:
        phase, setting, load: which.
        figure: ``requests/s``, ``TTFT`` or ``TPOT``.
        ratio: median over repeats, above 1 where eos is better.
        low, high: range over repeats.
        spread: range over median that repeats have by themselves, in this setting and in stock at any load of the
            phase, whichever is most; None where there is one repeat only.
    """

    phase: str
    setting: str
    load: float
    figure: str
    ratio: float
    low: float
    high: float
    spread: float | None

    @property
    def slower(self) -> bool:
        """Whether eos is slower beyond the spread: in every repeat, and by more than repeats differ."""
        return self.high < 1 and self.ratio < 1 - (self.spread or 0.0)


class Results:
    """What is in a results' folder."""

    def __init__(self, folder: Path, slo: Slo | None = None) -> None:
        """Reads all of it; ``slo`` None: limits from stock's own figures.

        Raises:
            SettingError: the folder holds no sweep, or no cell.
        """
        store = Store(folder)
        raw = store.sweep()
        self.settings: dict[str, Any] = raw["settings"]
        self.sessions: list[dict[str, Any]] = raw["sessions"]
        self.cells = [Cell.from_dict(cell) for cell in store.cells()]
        if not self.cells:
            raise SettingError("results", folder.name, "no cell is measured yet", "let loadtests.sweep run first")
        self.cells.sort(key=lambda cell: cell.started)
        self.groups = groups_of(self.cells)
        self._slo = slo

    @cached_property
    def phases(self) -> list[str]:
        """Phases that measure speed, in the order of the sweep."""
        names = [phase["name"] for phase in self.settings["phases"]]
        return [name for name in names if name != ACCURACY and any(g.phase == name for g in self.groups)]

    @cached_property
    def budgets(self) -> list[str]:
        """The eos settings, largest budget first."""
        return [str(budget) for budget in sorted(self.settings["budgets"], reverse=True)]

    def loads(self, phase: str) -> list[float]:
        """Loads of a phase, ascending."""
        return sorted({group.load for group in self.groups if group.phase == phase})

    def load_label(self, load: float) -> str:
        """For people."""
        return f"{load:g} arrivals/s" if self.open_loop else f"{load:g} at once"

    @cached_property
    def open_loop(self) -> bool:
        """Whether requests arrived at a rate."""
        return any(cell.rate is not None for cell in self.cells if cell.phase != ACCURACY)

    def group(self, phase: str, setting: str, load: float) -> Group | None:
        """The repeats of one setting under one load, None if none is measured."""
        wanted = (phase, setting, load)
        return next((g for g in self.groups if (g.phase, g.setting, g.load) == wanted), None)

    @cached_property
    def slo(self) -> Slo:
        """The limits of goodput."""
        if self._slo is not None:
            return self._slo
        for phase in self.phases:
            lone = self.group(phase, STOCK, self.loads(phase)[0])
            if lone is not None and lone.ttft(50) is not None:
                ttft, tpot = lone.ttft(50), lone.tpot(50)
                return Slo(SLO_FACTOR * (ttft or 0), SLO_FACTOR * tpot if tpot else None)
        return Slo()

    @cached_property
    def slo_is_ours(self) -> bool:
        """Whether nobody named limits."""
        return self._slo is None

    def promise(self, phase: str, setting: str) -> Promise | None:
        """The plan's promise for the prompts that were measured; None where the model's sizes are unknown.

        A promise is for requests of one image: None also where other scenarios were mixed in.
        """
        subject = self.settings["subjects"].get(phase, {})
        if subject.get("geometry") is None or (set(self.settings["scenarios"]) - {"single"} and phase != ACCURACY):
            return None
        tokens = [g.prompt_tokens for g in self.groups if g.phase == phase and g.prompt_tokens]
        if not tokens:
            return None
        sizes, profile = ModelGeometry(**subject["geometry"]), self.profile(phase)
        assert profile is not None
        text = round(sum(tokens) / len(tokens)) - sizes.visual_tokens
        outputs = 1 if phase == ACCURACY else self.settings["output_tokens"]
        budget = None if setting == STOCK else int(setting)
        try:
            return promise(sizes, profile, budget, text, outputs, self.settings["dtype"], self.settings["block_size"])
        except EosError:
            return None

    def profile(self, phase: str) -> Profile | None:
        """The profile of a phase's eos server."""
        document = self.settings["subjects"].get(phase, {}).get("profile")
        return None if document is None else parse_profile(document)

    def pool_bytes(self, phase: str) -> int | None:
        """KV memory of each of a phase's servers."""
        return self.settings["kv_cache_bytes"].get(phase)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """eos against stock, for every phase, load, budget and figure that both have."""
        found = []
        for group in self.groups:
            stock = self.group(group.phase, STOCK, group.load)
            if group.setting == STOCK or group.phase == ACCURACY or stock is None:
                continue
            for figure, speeds in _SPEEDS.items():
                ours, theirs = speeds(group), speeds(stock)
                ratios = sorted(ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs)
                if ratios:
                    spread = max(self._spread(group.phase, figure), relative_range(list(ours.values())))
                    known = spread if len(ratios) > 1 else None
                    key = (group.phase, group.setting, group.load, figure)
                    found.append(Verdict(*key, statistics.median(ratios), ratios[0], ratios[-1], known))
        return found

    def _spread(self, phase: str, figure: str) -> float:
        """What repeats of stock differ by at any load of a phase: two or three repeats of one load say too little."""
        stock = [group for group in self.groups if group.phase == phase and group.setting == STOCK]
        return max((relative_range(list(_SPEEDS[figure](group).values())) for group in stock), default=0.0)


def _rates(group: Group) -> dict[int, float]:
    return {cell.repeat: rate for cell in group.cells if (rate := cell.requests_per_second)}


def _medians(group: Group, latency: Callable[[Group], float | None]) -> dict[int, float]:
    """One over the median of each repeat, so that more is better as it is with rates."""
    ones = {cell.repeat: latency(Group(group.phase, group.setting, group.load, (cell,))) for cell in group.cells}
    return {repeat: 1 / value for repeat, value in ones.items() if value}


_SPEEDS: dict[str, Callable[[Group], dict[int, float]]] = {
    "requests/s": _rates,
    "TTFT": lambda group: _medians(group, lambda one: one.ttft(50)),
    "TPOT": lambda group: _medians(group, lambda one: one.tpot(50)),
}


def phase_title(phase: str) -> str:
    """A phase's name for people."""
    return _PHASE_TITLES.get(phase, phase)


def settings_of(results: Results) -> list[str]:
    """Stock and all budgets, in the order in which tables and pictures show them."""
    return [STOCK, *results.budgets]
