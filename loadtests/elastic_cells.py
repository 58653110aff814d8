"""What the sweep of elastic budgets measures: its options, its cells in order, and the limits of its goodput."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry
from loadtests.commands import add_option
from loadtests.records import Record
from loadtests.settings import above_zero, at_least_one
from loadtests.store import Store
from loadtests.subjects import Subject, fitted_profile, profile_title

STOCK, ELASTIC = "stock", "elastic"
UNLOADED, CAPACITY = "unloaded", "capacity"
# A budget that keeps every visual token of the embedded model.
ALL = 576
_POSITIVE = ("seconds", "ramp", "minutes", "slo_scale", "capacity_seconds")


@dataclass(frozen=True)
class Options:
    """All settings of a sweep; :meth:`add_arguments` says what each means."""

    out: Path = Path("runs/elastic")
    preset: str = "bench-88m"
    model: str | None = None
    profile: str = "sparsevlm-v2-llava-1.5-7b"
    embedded_profile: str = "embedded-sparsevlm-v2"
    elastic: str = "64:192"
    multiples: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    repeats: int = 3
    minutes: float = 50.0
    seconds: float = 35.0
    ramp: float = 10.0
    capacity_seconds: float = 40.0
    slo_scale: float = 3.0
    questions: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            SettingError: the first setting that is wrong.
        """
        for name in ("repeats", "questions"):
            at_least_one(name, getattr(self, name))
        for name in _POSITIVE:
            above_zero(name, getattr(self, name), f"give {getattr(Options, name):g}")
        if not self.multiples or min(self.multiples) <= 0 or len(set(self.multiples)) < len(self.multiples):
            raise SettingError("multiples", self.multiples, "they must be above 0, each once", "e.g. 0.5,1,2")
        for part in self.elastic.split(":"):
            if not part.isdigit():
                raise SettingError("elastic", self.elastic, "the fixed settings need numbers of tokens", "e.g. 64:192")

    @property
    def eos_arms(self) -> tuple[tuple[str, int | None], ...]:
        """Settings of the eos server, with the budget that their requests name."""
        low, _, high = self.elastic.partition(":")
        return ((high, int(high)), (low, int(low)), (ELASTIC, None))

    def to_dict(self) -> dict[str, Any]:
        """What a cell's figures depend on; lists of cells are not in it, for a folder may take more of them later."""
        left_out = ("out", "multiples", "repeats", "minutes")
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The command line."""
        texts = {
            "out": "folder of the raw results",
            "preset": "random weights of this shape, whose speed is measured",
            "model": "model directory instead",
            "profile": "scaled to the model's depth",
            "embedded_profile": "the same method for the embedded model, whose accuracy is measured",
            "elastic": "floor and ceiling",
            "multiples": "arrival rates, over stock's capacity",
            "repeats": "of every cell",
            "minutes": "start no further repeat later; the first one is always measured",
            "seconds": "of a cell's window",
            "ramp": "seconds in front of it",
            "capacity_seconds": "of the closed loops that measure stock, at least",
            "slo_scale": "goodput's limits over stock's median TTFT and latency without load",
            "questions": "that the embedded model is asked at each budget",
            "seed": "of all draws",
        }
        for name, text in texts.items():
            multiples = ",".join(f"{m:g}" for m in Options.multiples)
            add_option(parser, name, multiples if name == "multiples" else getattr(Options, name), text)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """The options of a parsed command line.

        Raises:
            SettingError: one that is wrong.
        """
        values = dict(vars(args))
        try:
            values["multiples"] = tuple(float(part) for part in values["multiples"].split(","))
        except ValueError:
            raise SettingError("multiples", values["multiples"], "they are no numbers", "e.g. 0.5,1,2") from None
        return cls(**values)


@dataclass(frozen=True)
class Cell:
    """One open loop: a setting at an arrival rate, ``multiple`` times stock's capacity; ``repeat`` counts from 1."""

    multiple: float
    arm: str
    budget: int | None
    repeat: int

    @property
    def key(self) -> str:
        """Name of the cell and of its file."""
        return f"rate/x{self.multiple:g}/{self.arm}/r{self.repeat}"


def cells_of(options: Options) -> list[Cell]:
    """All cells in order: repeat by repeat, rate by rate, settings there and back so that a drift slows all of them."""
    cells = []
    arms: Sequence[tuple[str, int | None]] = ((STOCK, None), *options.eos_arms)
    for repeat in range(1, options.repeats + 1):
        for multiple in options.multiples:
            for arm, budget in arms if repeat % 2 else reversed(arms):
                cells.append(Cell(multiple, arm, budget, repeat))
    return cells


def calibration(name: str, repeat: int) -> str:
    """Key of what stock was measured at before a repeat: a machine may be slower in another hour."""
    return f"calibration/{name}" + (f"/r{repeat}" if repeat > 1 else "")


@dataclass(frozen=True)
class Limits:
    """Stock's capacity in requests/s, and what a good request keeps: seconds from due to first and last token."""

    capacity: float
    ttft: float
    total: float

    @classmethod
    def of(cls, store: Store, scale: float, repeat: int = 1) -> "Limits":
        """From the calibration of a repeat; ``scale`` times stock's medians without load.

        Raises:
            SettingError: it is not measured.
        """
        keys = calibration(UNLOADED, repeat), calibration(CAPACITY, repeat)
        for key in keys:
            if not store.has(key):
                raise SettingError("results", store.folder.name, f"{key} is missing", "let the sweep run first")
        cells = {cell["key"]: cell for cell in store.cells() if cell["key"] in keys}
        unloaded, capacity = (cells[key] for key in keys)
        loaded = _window(capacity)
        client = capacity["client"]["window"]
        alone = [r for r in _window(unloaded) if not r.starter]
        return cls(
            capacity=len(loaded) / (client["closed"] - client["opened"]),
            ttft=scale * statistics.median(r.ttft for r in alone if r.ttft is not None),
            total=scale * statistics.median(r.times[-1] for r in alone),
        )

    def met(self, record: Record) -> bool:
        """Whether an answered request kept both."""
        if not record.good or record.from_due is None:
            return False
        return record.from_due <= self.ttft and record.late + record.times[-1] <= self.total

    @staticmethod
    def due(records: Sequence[Record], client: dict[str, Any]) -> list[Record]:
        """Requests that were due within the window, however long their answers took."""
        window = client["window"]
        return [r for r in records if window["opened"] < r.started - r.late <= window["closed"]]

    def __str__(self) -> str:
        return f"TTFT ≤ {self.ttft:.2f} s, last token ≤ {self.total:.2f} s"


def _window(cell: dict[str, Any]) -> list[Record]:
    records, window = [Record.from_dict(values) for values in cell["requests"]], cell["client"]["window"]
    return [r for r in records if r.good and window["opened"] < r.finished <= window["closed"]]


def levels_of(profile: Profile, elastic: str) -> tuple[Any, ...]:
    """The budgets that a server with this profile and ``--eos-elastic`` may choose.

    Raises:
        EosError: no range, or one that the profile cannot reach.
    """
    from eos_vllm.serving.elastic import levels, parse_range

    return levels(Planner(profile, block=32), *parse_range(elastic))


def embedded_subject(profile: str) -> Subject:
    """The embedded model with one of its profiles.

    Raises:
        EosError: the profile is unknown, or does not fit.
    """
    model = embedded.path()
    sizes = geometry(model)
    fitted = fitted_profile(profile, sizes)
    return Subject("embedded model", model, sizes, fitted, profile_title(profile, fitted))
