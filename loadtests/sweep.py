"""Throughput against the retain budget, stock vLLM against eos: raw results for ``loadtests.report``.

    python -m loadtests.sweep --out runs/loadtest         # half an hour on 2 cores
    python -m loadtests.sweep --out results/mine --stock-url http://a:8000 --eos-url http://b:8000 --served-name llava

Each cell is one locust run; what it gave is written before the next begins. A sweep that was stopped, or killed, goes
on where it was when the same command is given again.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eos_vllm.cli.server_process import ServerError
from eos_vllm.core.errors import EosError
from loadtests.cell import CellRun, LocustError, run_cell
from loadtests.grid import Cell, Load, Phase, cells_of
from loadtests.origin import origin
from loadtests.promise import promise
from loadtests.questions import export_benchmark
from loadtests.settings import Workload
from loadtests.store import Store
from loadtests.subjects import Subject, accuracy_subject, pool_bytes, serving, speed_subject
from loadtests.sweep_options import ACCURACY, SweepOptions, add_arguments, options_of

_ACCURACY_TOKENS = 8
_WARM_UP = Load(4, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep; 0 when all of it is measured, 1 if a server or locust failed, 2 for a mistake, 130 when stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/loadtest"), help="default: %(default)s")
    add_arguments(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="eos-sweep-") as folder:
            Sweep(options_of(args), Path(folder)).run()
    except EosError as e:
        print(f"loadtests.sweep: error: {e}", file=sys.stderr)
        return 2
    except (ServerError, LocustError) as e:
        print(f"loadtests.sweep: {e}\nThe same command goes on from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loadtests.sweep: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    print(f"raw results in {args.out}; draw them with: python -m loadtests.report {args.out}")
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Sweep:
    """The cells of some options, measured one after the other."""

    def __init__(self, options: SweepOptions, folder: Path) -> None:
        """Prepares models and questions in ``folder``, and the results' folder.

        Raises:
            EosError: options that fit neither each other nor the results that are there.
        """
        self.options, self.folder = options, folder
        self.start = time.monotonic()
        self.store = Store(options.out)
        self.phases = options.phases()
        self.subjects: dict[str, Subject] = {}
        left_out: dict[str, str] = {}
        speed = speed_subject(options, folder)
        for phase in self.phases:
            self.subjects[phase.name] = speed
            if phase.name == ACCURACY:
                try:
                    self.subjects[phase.name] = accuracy_subject(options)
                except EosError as e:
                    left_out[ACCURACY] = str(e)
        self.phases = [phase for phase in self.phases if phase.name not in left_out]
        images = max(load.requests for phase in self.phases for load in phase.loads)
        self.rows = options.rows or export_benchmark(folder / "rows", min(images, 400))
        self.store.begin(self._settings(), {"provenance": origin(seed=options.seed), "left_out": left_out})

    def _settings(self) -> dict[str, Any]:
        pools = {} if self.options.given else {p.name: self._pool(p) for p in self.phases}
        return {
            **self.options.to_dict(),
            "phases": [phase.to_dict() for phase in self.phases],
            "kv_cache_bytes": pools,
            "subjects": {phase.name: self.subjects[phase.name].to_dict() for phase in self.phases},
        }

    def _pool(self, phase: Phase) -> int:
        return pool_bytes(self.options, phase.name, self.subjects[phase.name])

    def run(self) -> None:
        """Measures what is not measured yet.

        Raises:
            ServerError: a server did not start.
            LocustError: a run ended badly.
        """
        todo = {phase.name: cells_of(phase, self.options.budgets, self.options.serial) for phase in self.phases}
        total = sum(self._weight(cell) for cells in todo.values() for cell in cells)
        shape = "{l_bar}{bar}| {elapsed} gone, {remaining} left"
        with tqdm(total=round(total, 3), bar_format=shape, disable=None) as self.bar:
            for number, phase in enumerate(self.phases):
                for cell in todo[phase.name]:
                    if self.store.has(cell.key):
                        self.bar.update(self._weight(cell))
                if not all(self.store.has(cell.key) for cell in todo[phase.name]):
                    self._run_phase(phase, todo[phase.name], len(self.phases) - number - 1)
        self.store.note(seconds=round(time.monotonic() - self.start))

    def _run_phase(self, phase: Phase, cells: list[Cell], phases_left: int) -> None:
        subject, start = self.subjects[phase.name], time.monotonic()
        self.bar.write(f"{phase.name}: starting servers")
        with serving(self.options, phase.name, subject) as (pair, name):
            warm: set[str] = set()
            for repeat in range(1, phase.repeats + 1):
                # A later phase needs one repeat at least, and its servers about as long to start as these.
                per_repeat = (time.monotonic() - start) / max(1, repeat - 1)
                if repeat > 1 and self._gone() + per_repeat * (1 + phases_left) > self.options.minutes * 60:
                    self._leave_out(phase, repeat, [c for c in cells if c.repeat >= repeat])
                    return
                for cell in (c for c in cells if c.repeat == repeat and not self.store.has(c.key)):
                    url = pair.url(cell.kind)
                    if url not in warm:
                        warm.add(url)
                        run_cell(self._workload(cell, url, name, _WARM_UP, f"warm up {cell.key}"), self._files(cell))
                    self._measure(cell, self._workload(cell, url, name, cell.load, cell.key))

    def _gone(self) -> float:
        return time.monotonic() - self.start

    def _leave_out(self, phase: Phase, repeat: int, cells: list[Cell]) -> None:
        reason = f"repeats {repeat} to {phase.repeats} were left out: {self.options.minutes:g} minutes were nearly gone"
        self.bar.write(f"{phase.name}: {reason}")
        self.bar.update(sum(self._weight(cell) for cell in cells if not self.store.has(cell.key)))
        left_out = self.store.sweep()["sessions"][-1]["left_out"]
        self.store.note(left_out=left_out | {phase.name: reason})

    def _files(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key.replace("/", "-")

    def _workload(self, cell: Cell, url: str, name: str, load: Load, label: str) -> Workload:
        accuracy = cell.phase == ACCURACY
        return Workload(
            base_url=url,
            model=name,
            rows=str(self.rows),
            concurrency=load.concurrency,
            rate=load.rate,
            requests=load.requests,
            budgets=cell.budgets,
            scenarios={"single": 1.0} if accuracy else self.options.scenarios,
            repeat_share=0.0 if accuracy else self.options.repeat_share,
            # Servers that are given may remember the images of an earlier sweep.
            label=f"{label} {time.time():.0f}",
            output_tokens=_ACCURACY_TOKENS if accuracy else self.options.output_tokens,
            fixed_output=not (accuracy or self.options.natural),
            prompt_characters=None if accuracy else self.options.prompt_characters,
            # The same questions for all settings of a repeat, others in the next.
            seed=self.options.seed + cell.repeat,
        )

    def _measure(self, cell: Cell, workload: Workload) -> None:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run = run_cell(workload, self._files(cell))
        self.store.save(
            cell.key,
            {
                "key": cell.key,
                "phase": cell.phase,
                "repeat": cell.repeat,
                "setting": cell.setting,
                "load": {"requests": cell.load.requests, "concurrency": cell.load.concurrency, "rate": cell.load.rate},
                "seed": workload.seed,
                "started": started,
                **run.to_dict(),
            },
        )
        self.bar.write(f"{cell.key}: {_line(run)}")
        self.bar.update(self._weight(cell))

    def _weight(self, cell: Cell) -> float:
        """Seconds in some unit: requests by the plan's ceiling, for the progress bar alone."""
        subject, speed_up = self.subjects[cell.phase], 1.0
        if cell.budgets and subject.sizes is not None and subject.profile is not None:
            with suppress(EosError):
                speed_up = promise(subject.sizes, subject.profile, cell.budgets[0], 88, 16).by_tokens
        small = 0.05 if cell.phase == ACCURACY else 1.0
        return small * cell.load.requests / speed_up + 1.0


def _line(run: CellRun) -> str:
    good = [record for record in run.records if record.good]
    if not good:
        return f"none of {len(run.records)} requests answered"
    seconds = max(r.finished for r in good) - min(r.started for r in run.records)
    return f"{len(good) / seconds:.3f} requests/s, {len(good)} of {len(run.records)} answered"


if __name__ == "__main__":
    sys.exit(main())
