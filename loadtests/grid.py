"""Which cells a sweep measures and in which order: stock and eos take turns, so that a drifting machine slows both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from eos_vllm.core.errors import SettingError
from loadtests.settings import at_least_one

Kind = Literal["stock", "stock-restricted", "eos"]
STOCK: Final = "stock"
RESTRICTED: Final = "stock-restricted"

# Weights of the kinds of visit that each scenario sends.
SCENARIOS: dict[str, dict[str, float]] = {
    "single": {"single": 1.0},
    "several": {"several": 1.0},
    "multi_turn": {"multi_turn": 1.0},
    "mixed": {"single": 3.0, "several": 1.0, "multi_turn": 1.0, "text_only": 1.0},
    "shared_system": {"shared_system": 1.0},
    "long_text": {"long_text": 1.0},
    "two_images": {"two_images": 1.0},
    "text_only": {"text_only": 1.0},
}
# Requests of a visit, where it is more than one.
VISIT_LENGTHS = {"several": 3, "multi_turn": 3}


@dataclass(frozen=True)
class Load:
    """How hard a cell pushes: ``concurrency`` users of a closed loop, or ``rate`` visits per second of an open one."""

    concurrency: int = 1
    rate: float | None = None

    @property
    def name(self) -> str:
        """Part of the cell's key."""
        return f"c{self.concurrency}" if self.rate is None else f"rate{self.rate:g}"

    @property
    def label(self) -> str:
        """For people."""
        if self.rate is not None:
            return f"{self.rate:g} visits/s"
        return "1 user" if self.concurrency == 1 else f"{self.concurrency} users"


@dataclass(frozen=True)
class Cell:
    """One locust run: a setting (stock or a budget) under a load in a scenario; ``repeat`` counts from 1."""

    scenario: str
    load: Load
    setting: str
    repeat: int

    @property
    def key(self) -> str:
        """Name of the cell; also that of its file, and the stamp of its images."""
        return f"{self.scenario}/{self.load.name}/{self.setting}/r{self.repeat}"

    @property
    def kind(self) -> Kind:
        """The server that it needs."""
        if self.setting == RESTRICTED:
            return RESTRICTED
        return "stock" if self.setting == STOCK else "eos"

    @property
    def budgets(self) -> tuple[int, ...]:
        """What its requests name."""
        return (int(self.setting),) if self.kind == "eos" else ()


def cells_of(
    scenarios: Sequence[str], loads: Sequence[Load], settings: Sequence[str], repeat: int, serial: bool = False
) -> list[Cell]:
    """One repeat of all cells in order.

    All settings follow each other in every scenario under every load, there in odd repeats and back in even ones.
    ``serial`` is for machines that hold one server at a time: all cells of one server, then all of the other.
    """
    ordered = list(settings) if repeat % 2 else list(reversed(settings))
    cells = [Cell(name, load, setting, repeat) for load in loads for name in scenarios for setting in ordered]
    if serial:
        kinds = list(dict.fromkeys(cell.kind for cell in cells))
        cells.sort(key=lambda cell: kinds.index(cell.kind))
    return cells


def parse_loads(concurrencies: str, rates: str | None = None) -> tuple[Load, ...]:
    """Loads from comma-separated numbers: users, or arrival rates where given.

    Raises:
        SettingError: no number above 0.
    """
    if rates is None:
        return tuple(Load(concurrency=users) for users in parse_numbers("concurrency", concurrencies, "1,8,24"))
    loads = []
    for part in rates.split(","):
        try:
            rate = float(part)
        except ValueError:
            raise SettingError("rates", part, "it is no number", "e.g. 0.2,0.5") from None
        if not rate > 0:
            raise SettingError("rates", part, "it must be above 0", "e.g. 0.2,0.5")
        loads.append(Load(rate=rate))
    return tuple(loads)


def parse_scenarios(text: str) -> tuple[str, ...]:
    """Scenarios from a comma-separated list, each once.

    Raises:
        SettingError: there is no such scenario, or one stands there twice.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in SCENARIOS:
            raise SettingError("scenarios", name, "no such scenario", f"choose from {', '.join(SCENARIOS)}")
        if names.count(name) > 1:
            raise SettingError("scenarios", name, "it stands there twice", "name each once")
    return tuple(names)


def parse_numbers(name: str, text: str, example: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more from a comma-separated list, each once.

    Raises:
        SettingError: no whole number of 1 or more, or one that stands there twice.
    """
    numbers = []
    for part in text.split(","):
        try:
            number = int(part)
        except ValueError:
            raise SettingError(name, part, "it is no whole number", f"e.g. {example}") from None
        at_least_one(name, number)
        if number in numbers:
            raise SettingError(name, part, "it stands there twice", "name each once")
        numbers.append(number)
    return tuple(numbers)
