"""Sweeps whose servers and locust runs are made up: everything else is the real code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from load_builders import cell_run, metrics, record

from eos_vllm.models.model_files import write_model_files
from eos_vllm.models.tiny import EMBEDDED
from loadtests import sweep
from loadtests.cell import CellRun
from loadtests.servers import GivenServers
from loadtests.settings import Workload

# Seconds per request of a made-up server that works on one request at a time.
SECONDS = {"stock": 2.0, 576: 2.01, 64: 0.5}


def setting_of(workload: Workload) -> Any:
    """``stock``, or the budget of a run."""
    return workload.budgets[0] if workload.budgets else "stock"


def made_up(workload: Workload, seconds: dict[Any, float] = SECONDS) -> CellRun:
    """A run whose window holds ten requests, answered one after the other; turns go round."""
    each = seconds[setting_of(workload)] * (1 + 0.01 * workload.seed)
    records = [
        replace(record(i, started=each * i, ttft=each - 0.4, tpot=0.1, tokens=5), question=1 + i % 3) for i in range(10)
    ]
    # The last token of the first answer opens the window of the nine that follow.
    window = {"opened": each + 0.01, "closed": 10 * each + 0.01, "full": True}
    rise = {"answered": 10.0, "prefix_cache_queries": 100.0, "prefix_cache_hits": 40.0}
    run = cell_run(records, metrics=metrics([1.0, 3.0], [0.1, 0.2], **rise))
    return replace(run, client=run.client | {"window": window, "late_encodings": 0})


class Runs:
    """Stands in for :func:`loadtests.cell.run_cell`; keeps the workloads."""

    def __init__(self, stop_after: int | None = None, run: Callable[[Workload], CellRun] = made_up) -> None:
        self.workloads: list[Workload] = []
        self.warmed: list[tuple[Any, tuple[str, ...]]] = []
        self.stop_after, self.run = stop_after, run

    def __call__(self, workload: Workload, folder: Path, **_: Any) -> CellRun:
        if self.stop_after is not None and len(self.workloads) >= self.stop_after:
            raise KeyboardInterrupt
        self.workloads.append(workload)
        return self.run(workload)

    @property
    def measured(self) -> list[str]:
        """Labels of the runs, without their time of day."""
        return [workload.label.rsplit(" ", 1)[0] for workload in self.workloads]


def arrange(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: Runs) -> Path:
    """Puts made-up servers and runs in place of real ones; returns a model directory without weights."""
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        write_model_files(EMBEDDED, model)

    @contextmanager
    def serving(*_: Any, **__: Any) -> Iterator[tuple[GivenServers, str]]:
        given = GivenServers("http://127.0.0.1:1", "http://127.0.0.1:2")
        monkeypatch.setattr(given, "wait", lambda _: None)
        yield given, "m"

    monkeypatch.setattr(sweep, "serving", serving)
    monkeypatch.setattr(sweep, "run_cell", runs)
    monkeypatch.setattr(sweep, "settle", lambda *_: None)
    monkeypatch.setattr(sweep, "warm_up", lambda w, s: runs.warmed.append((setting_of(w), tuple(s))))
    return model


def command(out: Path, model: Path, *more: str) -> list[str]:
    """A small sweep's command line."""
    return [
        *("--out", str(out), "--model", str(model), "--profile", "embedded-eos", "--budgets", "576,64"),
        *("--concurrency", "1,8", "--scenarios", "single,multi_turn", *more),
    ]
