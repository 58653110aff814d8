"""Budgets that follow the load, against fixed ones and stock vLLM: an open loop at multiples of stock's capacity.

    python -m loadtests.elastic_sweep --out results/elastic-cpu
    python -m loadtests.elastic_report results/elastic-cpu

First the embedded model is asked at each budget that the controller can choose. Before each repeat stock's latency
without load and its capacity are measured (closed loops): a machine may be slower in another hour. Then single
questions arrive at Poisson intervals, at the same moments and about the same pictures for all settings of a rate and
repeat. One eos server serves elastic and fixed budgets, for a request that names a budget keeps it. Each cell is
written before the next begins; the same command goes on.
"""

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from eos_vllm.core.budget import parse_budget
from eos_vllm.core.errors import SettingError
from eos_vllm.provenance import timestamp
from loadtests.bodies import user_message
from loadtests.cell import CellRun, LocustError, run_cell, settle
from loadtests.client import PATH
from loadtests.commands import command, parser_of, say
from loadtests.elastic_cells import (
    ALL,
    CAPACITY,
    ELASTIC,
    STOCK,
    UNLOADED,
    Cell,
    Limits,
    Options,
    calibration,
    cells_of,
    embedded_subject,
    levels_of,
)
from loadtests.origin import origin
from loadtests.questions import export_benchmark, read_rows
from loadtests.scenarios import visits
from loadtests.servers import MODEL_NAME, Servers, ServerSpec, servers
from loadtests.settings import Workload
from loadtests.store import Store
from loadtests.subjects import Subject, pool_bytes, speed_subject
from loadtests.sweep_options import PROMPT_CHARACTERS, SweepOptions
from loadtests.warmup import warm_up

_IMAGES = 200
# Seconds that a cell takes beside its ramp and window, and that servers take to start: for the estimate.
_BESIDE, _STARTING, _PER_QUESTION = 8.0, 150.0, 0.08
# Lone arrivals after which a controller that is not at its ceiling again never will be.
_CALM_MOST = 40


@command("elastic_sweep", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep; 0 at its end, 1 if a server or locust failed, 2 for a mistake, 130 when stopped."""
    parser = parser_of("elastic_sweep", __doc__)
    Options.add_arguments(parser)
    options = Options.of(parser.parse_args(argv))
    with tempfile.TemporaryDirectory(prefix="eos-elastic-") as folder:
        Sweep(options, Path(folder)).run()
    print(f"raw results in {options.out}; tables and figure: python -m loadtests.elastic_report {options.out}")
    return 0


class Sweep:
    """The cells of some options, measured one after the other."""

    def __init__(self, options: Options, folder: Path) -> None:
        """Prepares models and questions in ``folder``, and the results' folder.

        Raises:
            EosError: options that fit neither each other nor the results that are there.
        """
        self.options, self.folder = options, folder
        self.start = time.monotonic()
        self.base = SweepOptions(options.out, preset=options.preset, model=options.model, profile=options.profile)
        self.subject = speed_subject(self.base, folder)
        assert self.subject.profile is not None
        self.levels = levels_of(self.subject.profile, options.elastic)
        self.judge = embedded_subject(options.embedded_profile)
        assert self.judge.profile is not None
        if (others := levels_of(self.judge.profile, options.elastic)) != self.levels:
            problem = f"budgets of the two profiles differ: {self.levels} and {others}"
            raise SettingError("embedded-profile", options.embedded_profile, problem, "name one of the same method")
        self.store = Store(options.out)
        settings = options.to_dict() | {"levels": list(self.levels), "subject": self.subject.to_dict()}
        facts = origin(seed=options.seed)
        self.store.begin(settings | {"judge": self.judge.to_dict()}, {"provenance": facts})
        # Rates and limits are those of the machine that was calibrated.
        if (there := self.store.sweep()["sessions"][0]["provenance"]["machine"]) != facts["machine"]:
            problem = f"it was begun on another machine ({there['processor']}, {there['cores']} cores)"
            raise SettingError("out", str(options.out.name), problem, "name another folder")
        self.rows = export_benchmark(folder / "rows", _IMAGES)
        self.arrivals = itertools.count()

    def run(self) -> None:
        """Measures what is not measured yet.

        Raises:
            ServerError: a server did not start.
            LocustError: a run ended badly.
        """
        say(f"about {self._estimate() / 60:.0f} minutes")
        if any(not self.store.has(f"accuracy/{budget}") for budget in (ALL, *self.levels)):
            self._accuracy()
        if any(not self.store.has(cell.key) for cell in cells_of(self.options)):
            with self._serving(self.subject) as running:
                self._warm(running)
                self._cells(running)
        self.store.note(seconds=round(time.monotonic() - self.start))

    def _estimate(self) -> float:
        """Seconds that are left, roughly."""
        o = self.options
        left = sum(not self.store.has(cell.key) for cell in cells_of(o))
        questions = sum(not self.store.has(f"accuracy/{budget}") for budget in (ALL, *self.levels)) * o.questions
        seconds = left * (o.ramp + o.seconds + _BESIDE) + questions * _PER_QUESTION + _STARTING * (left > 0)
        calibrations = sum(not self.store.has(calibration(CAPACITY, r)) for r in range(1, o.repeats + 1))
        return seconds + (questions > 0) * _STARTING / 2 + calibrations * 3 * o.capacity_seconds

    @contextmanager
    def _serving(self, subject: Subject, stock: bool = True) -> Iterator[Servers]:
        assert subject.profile is not None
        assert subject.sizes is not None
        spec = ServerSpec(
            model=str(subject.model),
            profile=subject.profile,
            kv_bytes=pool_bytes(self.base, subject.sizes),
            max_model_len=self.base.max_model_len,
            arguments=self.base.arguments(),
            eos_arguments=("--eos-elastic", self.options.elastic),
        )
        say(f"starting servers: {subject.name}")
        with servers(spec, ("stock", "eos") if stock else ("eos",)) as pair:
            yield pair

    def _workload(self, url: str, label: str, budget: int | None, **more: Any) -> Workload:
        values: dict[str, Any] = {
            "rows": str(self.rows),
            "window_most": 120.0,
            "prompt_characters": PROMPT_CHARACTERS,
            # New images in every run: nothing of an earlier one is in a cache, or in the controller's memory.
            "label": f"{label} {time.time():.0f}",
            "budgets": () if budget is None else (budget,),
            "seed": self.options.seed,
        }
        return Workload(base_url=url, model=MODEL_NAME, **(values | more))

    def _accuracy(self) -> None:
        """How often the embedded model is right at each level, and with all tokens, on the same questions."""
        rows = export_benchmark(self.folder / "asked", self.options.questions)
        with self._serving(self.judge, stock=False) as running:
            url = running.url("eos")
            for budget in (ALL, *self.levels):
                key = f"accuracy/{budget}"
                if self.store.has(key):
                    continue
                more = {"rows": str(rows), "requests": self.options.questions, "concurrency": 4}
                workload = self._workload(url, key, budget, **more, fixed_output=False, prompt_characters=None)
                run = self._measured(workload, key, {"budget": budget})
                marks = [r.right for r in run.records if r.right is not None]
                say(f"{key}: {sum(marks)} of {len(marks)} right in {run.seconds:.0f} s")

    def _warm(self, running: Servers) -> None:
        for arm, budget, kind in ((STOCK, None, "stock"), *((a, b, "eos") for a, b in self.options.eos_arms)):
            say(f"warming up: {arm}")
            warm_up(self._workload(running.url(kind), f"warm up {arm}", budget), ("single",))  # type: ignore[arg-type]

    def _calibrate(self, running: Servers, repeat: int) -> Limits:
        """Stock's latency without load, and its capacity."""
        url, seconds = running.url("stock"), self.options.capacity_seconds
        for name, users, answers in ((UNLOADED, 1, 6), (CAPACITY, 8, 16)):
            key = calibration(name, repeat)
            if not self.store.has(key):
                more = {"concurrency": users, "window": seconds, "window_requests": answers if seconds > 10 else 3}
                self._measured(self._workload(url, key, None, **more), key, {"users": users})
                settle(url, MODEL_NAME)
        limits = Limits.of(self.store, self.options.slo_scale, repeat)
        say(f"stock: {limits.capacity:.3f} requests/s; goodput: {limits}")
        return limits

    def _cells(self, running: Servers) -> None:
        limits: dict[int, Limits] = {}
        begun: tuple[int, float] | None = None
        for cell in cells_of(self.options):
            if self.store.has(cell.key):
                continue
            # Settings of a rate are compared, so that all of them are measured in a repeat, or none.
            fresh, begun = (cell.repeat, cell.multiple) != begun, (cell.repeat, cell.multiple)
            if fresh and cell.repeat > 1 and time.monotonic() - self.start > 60 * self.options.minutes:
                say(f"{self.options.minutes:g} minutes are over: the rest is left to the same command")
                self.store.note(left_out=f"repeat {cell.repeat} from {cell.multiple:g} on: the minutes were over")
                return
            if cell.repeat not in limits:
                limits[cell.repeat] = self._calibrate(running, cell.repeat)
            self._cell(running, cell, limits[cell.repeat])

    def _cell(self, running: Servers, cell: Cell, limits: Limits) -> None:
        o, url = self.options, running.url("stock" if cell.arm == STOCK else "eos")
        calm = self._to_ceiling(url) if cell.arm == ELASTIC else None
        rate = cell.multiple * limits.capacity
        more: dict[str, Any] = {"rate": rate, "window": o.seconds, "open_ramp": o.ramp}
        # What is due as the window closes may still keep the limit.
        more |= {"ramp_most": limits.total + 0.5, "prepare": math.ceil(1.5 * rate * (o.ramp + o.seconds)) + 8}
        more |= {"seed": o.seed + cell.repeat}
        facts = {"multiple": cell.multiple, "rate": rate, "arm": cell.arm, "repeat": cell.repeat}
        workload = self._workload(url, cell.key, cell.budget, **more)
        run = self._measured(workload, cell.key, facts | {"seed": workload.seed, "calm_arrivals": calm})
        settle(url, MODEL_NAME)
        met = sum(limits.met(record) for record in limits.due(run.records, run.client))
        say(f"[{(time.monotonic() - self.start) / 60:.1f} min] {cell.key}: {met / o.seconds:.3f} good requests/s, "
            f"{run.seconds:.0f} s, budgets {run.metrics['budgets']}")  # fmt: skip

    def _measured(self, workload: Workload, key: str, facts: dict[str, Any]) -> CellRun:
        started = timestamp()
        run = run_cell(workload, self.folder / "cells" / key.replace("/", "-"))
        if failed := sorted({record.cause for record in run.records if record.cause is not None}):
            raise LocustError(f"{key}: requests failed ({', '.join(failed)}); see the server's log")
        self.store.save(key, facts | {"started": started} | run.to_dict())
        return run

    def _to_ceiling(self, url: str) -> int:
        """Lone requests, one after the other, until the controller gives its ceiling; returns how many it took.

        Raises:
            LocustError: it never does, or one fails.
        """
        ceiling = parse_budget(self.options.elastic.partition(":")[2])
        workload = self._workload(url, f"calm {next(self.arrivals)}", None)
        for count, visit in enumerate(itertools.islice(visits(workload, read_rows(self.rows)), _CALM_MOST), start=1):
            body: dict[str, Any] = {"model": MODEL_NAME, "messages": [user_message(visit.asks[0])], "max_tokens": 1}
            reply = requests.post(url + PATH, json=body, timeout=120)
            if reply.status_code != 200:
                raise LocustError(f"the server answers {reply.status_code}: {reply.text[:300]}")
            if reply.json()["kv_transfer_params"]["eos_retain"] == ceiling:
                return count
        raise LocustError(f"after {_CALM_MOST} lone requests the controller is not at its ceiling")


if __name__ == "__main__":
    sys.exit(main())
