"""Stock vLLM with its own defaults against eos, scenario by scenario and load by load: raw results for the report.

    python -m loadtests.sweep --out results/loadtest-cpu
    python -m loadtests.sweep --out results/mine --stock-url http://a:8000 --eos-url http://b:8000 --served-name llava

Each cell is one locust run; what it gave is written before the next begins. First every cell is measured once, then
those that are close to stock again. A sweep that was stopped, or ran out of minutes, goes on with the same command.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eos_vllm.provenance import timestamp
from loadtests.cell import CellRun, LocustError, run_cell, settle
from loadtests.commands import command, parser_of, say
from loadtests.figures import Steady
from loadtests.grid import SCENARIOS, STOCK, Cell, Kind, Load, cells_of
from loadtests.origin import origin
from loadtests.questions import export_benchmark
from loadtests.results import Results
from loadtests.servers import GivenServers, Servers
from loadtests.settings import Workload
from loadtests.store import Store
from loadtests.subjects import pool_bytes, serving, speed_subject
from loadtests.sweep_options import SweepOptions, add_arguments, options_of
from loadtests.warmup import warm_up

_IMAGES = 200
# Visits encoded before a run's first request: for each user so many, and never fewer than the least.
_PREPARED, _PREPARED_LEAST = 8, 32


@command("sweep", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep; 0 at its end, 1 if a server or locust failed, 2 for a mistake, 130 when stopped."""
    parser = parser_of("sweep", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="eos-sweep-") as folder:
        Sweep(options_of(args), Path(folder)).run()
    print(f"raw results in {args.out}; table and figure: python -m loadtests.report {args.out} --markdown")
    return 0


class Sweep:
    """The cells of some options, measured one after the other."""

    def __init__(self, options: SweepOptions, folder: Path) -> None:
        """Prepares model and questions in ``folder``, and the results' folder.

        Raises:
            EosError: options that fit neither each other nor the results that are there.
        """
        self.options, self.folder = options, folder
        self.start = time.monotonic()
        self.store = Store(options.out)
        self.subject = speed_subject(options, folder)
        self.rows = options.rows or export_benchmark(folder / "rows", _IMAGES)
        pool = None if self.subject.sizes is None else pool_bytes(options, self.subject.sizes)
        settings = options.to_dict() | {"kv_cache_bytes": pool, "subject": self.subject.to_dict()}
        self.store.begin(settings, {"provenance": origin(seed=options.seed)})

    def run(self) -> None:
        """Measures what is not measured yet.

        Raises:
            ServerError: a server did not start.
            LocustError: a run ended badly.
            SettingError: a server that was given does not answer.
        """
        kinds = tuple(dict.fromkeys(cell.kind for cell in self._cells(1)))
        todo = self._todo()
        if not todo:
            self.store.note(seconds=0)
            return
        say("starting servers")
        with serving(self.options, self.subject, kinds=kinds) as (servers, name):
            self.servers, self.name = servers, name
            self.warm: set[tuple[str, str]] = set()
            while todo:
                if todo[0].repeat > 1 and self._gone() > 60 * self.options.minutes:
                    say(f"{self.options.minutes:g} minutes are over: further repeats are left to the same command")
                    self.store.note(left_out=f"repeats from {todo[0].repeat} on: the minutes were over")
                    break
                self._round(todo)
                todo = self._todo()
        self.store.note(seconds=round(self._gone()))

    def _round(self, todo: list[Cell]) -> None:
        """Measures cells until it is time to ask again which ones are close."""
        for number, cell in enumerate(todo):
            if cell.repeat > 1 and self._gone() > 60 * self.options.minutes:
                return
            self._measure(cell, f"[{number + 1}/{len(todo)}, {self._gone() / 60:.1f} min]")

    def _cells(self, repeat: int) -> list[Cell]:
        o = self.options
        return cells_of(o.scenarios, o.loads, o.settings, repeat, o.serial)

    def _todo(self) -> list[Cell]:
        """Missing cells of the first repeat that lacks any; from then on those of settings that are close."""
        for repeat in range(1, max(self.options.repeats, self.options.repeats_close) + 1):
            cells = self._cells(repeat)
            if repeat > self.options.repeats:
                close = Results(self.options.out).close(self.options.settings, before=repeat)
                pairs = {(scenario, load) for scenario, load, _ in close}
                cells = [
                    c
                    for c in cells
                    if (c.scenario, c.load, c.setting) in close
                    or (c.setting == STOCK and (c.scenario, c.load) in pairs)
                ]
            missing = [cell for cell in cells if not self.store.has(cell.key)]
            if missing:
                return missing
        return []

    def _gone(self) -> float:
        return time.monotonic() - self.start

    def _workload(self, url: str, scenario: str, load: Load, budgets: tuple[int, ...], label: str) -> Workload:
        o = self.options
        return Workload(
            base_url=url,
            model=self.name,
            rows=str(self.rows),
            concurrency=load.concurrency,
            rate=load.rate,
            window=o.seconds,
            window_requests=o.window_requests(scenario, load),
            window_most=o.window_most,
            ramp_most=o.ramp_most,
            prepare=max(_PREPARED_LEAST, _PREPARED * load.concurrency),
            budgets=budgets,
            scenarios=SCENARIOS[scenario],
            system_characters=o.system_characters,
            long_characters=o.long_characters,
            # Servers that are given may remember the images of an earlier sweep.
            label=f"{label} {time.time():.0f}",
            output_tokens=o.output_tokens,
            fixed_output=not o.natural,
            prompt_characters=o.prompt_characters,
        )

    def _warm(self, servers: Servers | GivenServers, kind: Kind) -> str:
        """The server's address, all its settings warmed up once since it started."""
        url = servers.url(kind)
        for cell in self._cells(1):
            if cell.kind == kind and (url, cell.setting) not in self.warm:
                self.warm.add((url, cell.setting))
                say(f"warming up: {cell.setting}")
                label = f"warm up {cell.setting}"
                warm_up(self._workload(url, "single", Load(), cell.budgets, label), self.options.scenarios)
        return url

    def _measure(self, cell: Cell, head: str) -> None:
        if isinstance(self.servers, GivenServers):
            self.servers.wait(self.options.wait)
        url = self._warm(self.servers, cell.kind)
        # The same questions for all settings of a repeat, others in the next.
        seed = self.options.seed + cell.repeat
        workload = self._workload(url, cell.scenario, cell.load, cell.budgets, cell.key)
        workload = Workload.from_dict(workload.to_dict() | {"seed": seed})
        started = timestamp()
        run = run_cell(workload, self.folder / "cells" / cell.key.replace("/", "-"))
        if not any(record.good for record in run.records):
            causes = sorted({record.cause or "cut off" for record in run.records})
            raise LocustError(f"{cell.key}: no request was answered ({', '.join(causes) or 'none was sent'})")
        settle(url, self.name)
        facts = {"scenario": cell.scenario, "load": asdict(cell.load), "setting": cell.setting, "repeat": cell.repeat}
        facts |= {"seed": seed, "started": started}
        self.store.save(cell.key, facts | run.to_dict())
        say(f"{head} {cell.key}: {_line(run)}")


def _line(run: CellRun) -> str:
    steady = Steady.of(run.records, run.client)
    failed = sum(record.cause is not None for record in run.records)
    text = (
        f"{steady.requests_per_second:.3f} requests/s, {len(steady.answered)} in {steady.closed - steady.opened:.1f} s"
    )
    text += f" after {steady.opened:.1f} s"
    return text + (f", {failed} FAILED" if failed else "")


if __name__ == "__main__":
    sys.exit(main())
