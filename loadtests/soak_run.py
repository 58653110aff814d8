"""A soak of servers that run: load, memory meanwhile, what they hold when everybody has left, and one more request."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_vllm.cli.server_process import Server
from loadtests.cell import CellRun, run_cell, settle
from loadtests.memory import MemoryWatch, growth
from loadtests.records import Record
from loadtests.replicas import Cluster
from loadtests.server_metrics import fetch
from loadtests.settings import Workload

_DRAIN_SECONDS = 120
_LEAST_SAMPLES = 40
_GAUGES = ("running", "waiting", "kv_usage", "eos_blocks_held")


@dataclass(frozen=True)
class Soaked:
    """A soak of one kind of servers: its run, the resident bytes of each server over time, gauges at the end."""

    run: CellRun
    memory: list[list[tuple[float, int]]]
    drained: dict[str, float]
    alive: bool
    answered: bool

    @property
    def sizes(self) -> list[list[int]]:
        """Resident bytes alone, by server."""
        return [[size for _, size in samples] for samples in self.memory]

    def to_dict(self) -> dict[str, Any]:
        """Plain data of a soak that nobody judges."""
        return {
            "seconds": round(self.run.seconds, 1),
            "requests": counted(self.run.records),
            "requests_per_second": round(sum(r.good for r in self.run.records) / self.run.seconds, 3),
            "drained": self.drained,
            "resident_bytes": self.memory,
            "growth": [growth(sizes) for sizes in self.sizes],
            "metrics": self.run.metrics,
        }


def soaked_by(cluster: Cluster, workload: Workload, folder: Path) -> Soaked:
    """Runs the workload to its end, and looks at what it left.

    Raises:
        LocustError: locust ended badly, or a server was still busy two minutes later.
    """
    period = 5.0 if workload.seconds is None else min(5.0, workload.seconds / _LEAST_SAMPLES)
    # A run by number has no known length, and a short one needs samples, too.
    period = min(period, (workload.requests or 100_000) / 1000)
    with ExitStack() as stack:
        watches = [stack.enter_context(MemoryWatch(s.process.pid, period)) for s in cluster.servers]
        run = run_cell(workload, folder / "run", period=5.0, look=cluster.look)
    drained: dict[str, float] = {}
    for server in cluster.servers:
        if len(cluster.servers) > 1:
            # Gauges stay as they were where a server's last requests were aborted.
            settle(server.url, workload.model)
        one = drain(server)
        drained = {name: drained.get(name, 0.0) + value for name, value in one.items()} if one else {}
        if not one:
            break
    last = run_cell(_one_more(workload), folder / "last", look=cluster.look)
    answered = bool(last.records) and all(record.good for record in last.records)
    return Soaked(run, [watch.samples for watch in watches], drained, cluster.alive, answered)


def _one_more(workload: Workload) -> Workload:
    values = workload.to_dict() | {"seconds": None, "requests": 1, "concurrency": 1, "scenarios": {"single": 1.0}}
    return Workload.from_dict(values | {"abort_share": 0.0, "malformed_share": 0.0, "label": "last"})


def drain(server: Server) -> dict[str, float]:
    """The server's gauges once they are all at 0, or after two minutes."""
    deadline, values = time.monotonic() + _DRAIN_SECONDS, {}
    while time.monotonic() < deadline:
        try:
            values = {name: value for name, value in fetch(server.url).values.items() if name in _GAUGES}
        except (OSError, ValueError):
            return {}
        if not any(values.values()):
            break
        time.sleep(1)
    return values


def counted(records: Sequence[Record]) -> dict[str, Any]:
    """Requests by what they were and what came of them."""
    kinds = Counter("broken" if r.fault else "left half way" if r.aborted else r.scenario for r in records)
    return {
        "all": len(records),
        "by kind": dict(kinds),
        "by fault": dict(Counter(r.fault for r in records if r.fault)),
        "by budget": {str(k): v for k, v in Counter(r.budget for r in records if r.fault is None).items()},
        "failed": dict(Counter(r.cause for r in records if r.cause is not None)),
    }
