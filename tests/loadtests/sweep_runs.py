"""Sweeps whose servers and locust runs are made up: everything else is the real code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from load_builders import cell_run, metrics, record

from eos_vllm.models.geometry import geometry
from eos_vllm.models.model_files import write_model_files
from eos_vllm.models.tiny import EMBEDDED
from loadtests import sweep
from loadtests.cell import CellRun
from loadtests.servers import GivenServers
from loadtests.settings import Workload
from loadtests.subjects import Subject, fitted_profile

# Seconds per request of a made-up server that works on one request at a time.
SECONDS = {"stock": 2.0, 576: 2.01, 64: 0.5}
RIGHT = {"stock": 9, 576: 9, 64: 8}


def setting_of(workload: Workload) -> Any:
    """``stock``, or the budget of a run."""
    return workload.budgets[0] if workload.budgets else "stock"


def made_up(workload: Workload, seconds: dict[Any, float] = SECONDS) -> CellRun:
    """A run whose requests are answered one after the other."""
    setting = setting_of(workload)
    number = workload.requests or 0
    each = seconds[setting] * (1 + 0.01 * workload.seed)
    marked = workload.prompt_characters is None
    records = [
        record(
            i,
            started=0.0,
            ttft=each * (i + 1) - 0.4,
            answer=("yes" if i % 10 < RIGHT[setting] else "no") if marked else None,
            budget=None if setting == "stock" else setting,
        )
        for i in range(number)
    ]
    running = float(min(workload.concurrency, 2 if setting == "stock" else 6))
    usage = metrics(
        [running, running],
        [0.1 * running, 0.1 * running],
        blocks=1000,
        answered=float(number),
        generation_tokens=5.0 * number,
        prompt_tokens=664.0 * number,
        preemptions=0.0,
    )
    return cell_run(records, metrics=usage)


class Runs:
    """Stands in for :func:`loadtests.cell.run_cell`; keeps the workloads."""

    def __init__(self, stop_after: int | None = None, run: Callable[[Workload], CellRun] = made_up) -> None:
        self.workloads: list[Workload] = []
        self.stop_after, self.run = stop_after, run

    def __call__(self, workload: Workload, folder: Path, **_: Any) -> CellRun:
        if self.stop_after is not None and len(self.workloads) >= self.stop_after:
            raise KeyboardInterrupt
        self.workloads.append(workload)
        return self.run(workload)

    @property
    def measured(self) -> list[str]:
        """Labels of the runs that count, without their time of day."""
        labels = [workload.label.rsplit(" ", 1)[0] for workload in self.workloads]
        return [label for label in labels if not label.startswith("warm up")]


def arrange(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: Runs) -> Path:
    """Puts made-up servers and runs in place of real ones; returns a model directory without weights."""
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        write_model_files(EMBEDDED, model)

    @contextmanager
    def serving(*_: Any) -> Iterator[tuple[GivenServers, str]]:
        yield GivenServers("http://127.0.0.1:1", "http://127.0.0.1:2"), "m"

    sizes = geometry(model)
    monkeypatch.setattr(sweep, "serving", serving)
    monkeypatch.setattr(sweep, "run_cell", runs)
    subject = Subject("embedded model", model, sizes, fitted_profile("embedded-eos", sizes))
    monkeypatch.setattr(sweep, "accuracy_subject", lambda _: subject)
    return model


def command(out: Path, model: Path, *more: str) -> list[str]:
    """A small sweep's command line."""
    return [
        *("--out", str(out), "--model", str(model), "--profile", "embedded-eos", "--budgets", "576,64"),
        *("--concurrency", "1,8", "--requests", "3,12", "--accuracy-requests", "20", *more),
    ]
