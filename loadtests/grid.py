"""Which cells a sweep measures and in which order: stock and eos take turns, so that a drifting machine slows both."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eos_vllm.core.errors import SettingError
from loadtests.settings import at_least_one

STOCK = "stock"
Kind = Literal["stock", "eos"]


@dataclass(frozen=True)
class Load:
    """How hard a cell pushes: ``concurrency`` users of a closed loop, or ``rate`` visits per second of an open one."""

    requests: int
    concurrency: int = 1
    rate: float | None = None

    @property
    def name(self) -> str:
        """Part of the cell's key."""
        return f"c{self.concurrency}" if self.rate is None else f"rate{self.rate:g}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} arrivals/s"


@dataclass(frozen=True)
class Phase:
    """Cells that share a pair of servers.

    Attributes:
        name: ``large`` and ``bound`` for the KV cache, ``accuracy`` for the benchmark's answers.
        loads: how hard, one after the other.
        repeats: times that all of it is measured.
    """

    name: str
    loads: tuple[Load, ...]
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """One locust run: a setting (``stock`` or a budget) under a load; ``repeat`` counts from 1."""

    phase: str
    repeat: int
    load: Load
    setting: str

    @property
    def key(self) -> str:
        """Name of the cell; also that of its file, and the stamp of its images."""
        return f"{self.phase}/r{self.repeat}/{self.load.name}/{self.setting}"

    @property
    def kind(self) -> Kind:
        """The server that it needs."""
        return "stock" if self.setting == STOCK else "eos"

    @property
    def budgets(self) -> tuple[int, ...]:
        """What its requests name."""
        return () if self.setting == STOCK else (int(self.setting),)


def cells_of(phase: Phase, budgets: Sequence[int], serial: bool = False) -> list[Cell]:
    """The cells of a phase in order.

    Interleaved, stock and all budgets follow each other at every load, there in odd repeats and back in even ones.
    ``serial`` is for machines that hold one server at a time: all loads of stock, then all of eos, per repeat.
    """
    cells = []
    for repeat in range(1, phase.repeats + 1):
        settings = [STOCK, *map(str, budgets)]
        if repeat % 2 == 0:
            settings.reverse()
        block = [Cell(phase.name, repeat, load, setting) for load in phase.loads for setting in settings]
        if serial:
            first = block[0].kind
            block.sort(key=lambda cell: cell.kind != first)
        cells += block
    return cells


def parse_loads(concurrencies: str, requests: str, rates: str | None = None) -> tuple[Load, ...]:
    """Loads from comma-separated numbers; ``requests`` has one number for each load, or one for all.

    Raises:
        SettingError: no number, or the lists do not match.
    """
    values: list[float] = []
    name, text = ("rate", rates) if rates else ("concurrency", concurrencies)
    for part in text.split(","):
        try:
            values.append(float(part) if rates else int(part))
        except ValueError:
            raise SettingError(name, part, "it is no number", "e.g. 1,8,24") from None
    counts = _whole_numbers("requests", requests)
    if len(counts) == 1:
        counts *= len(values)
    if len(counts) != len(values):
        problem = f"there are {len(values)} loads"
        raise SettingError("requests", requests, problem, "give one number for each of them, or one for all")
    for value in values:
        if value <= 0:
            raise SettingError(name, value, "it must be above 0", "give a positive number")
    if rates:
        return tuple(Load(n, rate=rate) for n, rate in zip(counts, values, strict=True))
    return tuple(Load(n, concurrency=int(users)) for n, users in zip(counts, values, strict=True))


def parse_budgets(text: str) -> tuple[int, ...]:
    """Budgets from comma-separated whole numbers, each once.

    Raises:
        SettingError: no whole number of 1 or more, or one that stands there twice.
    """
    budgets = _whole_numbers("budgets", text)
    if len(set(budgets)) != len(budgets):
        raise SettingError("budgets", text, "a budget stands there twice", "name each once")
    return tuple(budgets)


def _whole_numbers(name: str, text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        try:
            number = int(part)
        except ValueError:
            raise SettingError(name, part, "it is no whole number", "e.g. 576,192,64,16") from None
        at_least_one(name, number)
        numbers.append(number)
    return numbers
