"""One cell of a sweep: locust in a process of its own against one server, with the server's metrics over time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from loadtests.client import ask
from loadtests.records import Record, read_records
from loadtests.server_metrics import Snapshot, Watch, fetch, summed
from loadtests.settings import Workload

_ROOT = Path(__file__).resolve().parent.parent
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_TAIL = 2000
PROBE = "."


class LocustError(RuntimeError):
    """locust itself ended badly; the text holds the end of its log."""


@dataclass(frozen=True)
class CellRun:
    """What a run gave: its records, the server's metrics, the client's own facts, and the seconds that it all took."""

    records: list[Record]
    metrics: dict[str, Any]
    client: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for raw results in bulk."""
        return {
            "seconds": round(self.seconds, 2),
            "client": self.client,
            "metrics": summed(self.metrics),
            "requests": [record.compact() for record in self.records],
        }


def locust_command(workload: Workload, folder: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run whose files are in ``folder``."""
    # An open loop has one user, who sends visits off when they are due.
    users = str(1 if workload.rate is not None else workload.concurrency)
    return [
        *(sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", users, "--spawn-rate", users, "--loglevel", "WARNING"),
        *("--workload", str(folder / "workload.json"), "--records", str(folder / "records.jsonl")),
        *extra,
    ]


def settle(base_url: str, model: str, seconds: float = 120.0) -> None:
    """Waits until the server has nothing more to do: what one run cut off shall not slow the next.

    vLLM's gauges stay as they were when its last requests were aborted, for nothing happens any more that would set
    them. So each look comes behind a request of one token, whose answer also shows that the step before it is over.

    Raises:
        LocustError: it is still busy, or does not answer, after so many seconds.
    """
    body = {"model": model, "messages": [{"role": "user", "content": PROBE}], "max_tokens": 1}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    deadline, problem = time.monotonic() + seconds, ""
    with requests.Session() as session:
        while time.monotonic() < deadline:
            reply = ask(session, base_url, body, timeout=seconds)
            problem = reply.cause or "still busy"
            with suppress(OSError, ValueError):
                values = fetch(base_url).values
                if reply.cause is None and not values.get("running") and not values.get("waiting"):
                    return
            time.sleep(0.2)
    raise LocustError(f"{problem}, {seconds:g} s after the last request of a run was sent")


def run_cell(
    workload: Workload,
    folder: Path,
    period: float = 1.0,
    extra: tuple[str, ...] = (),
    look: Callable[[str], Snapshot] = fetch,
) -> CellRun:
    """Runs locust to the end of the workload.

    Args:
        workload: what to send where.
        folder: takes locust's files.
        period: seconds between two looks at the server's metrics.
        extra: further arguments of locust, ``--html`` or ``--csv`` say.
        look: reads the server's metrics; where the workload's address is a router's, those behind it.

    Raises:
        LocustError: locust did not come to its end, or left no records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workload.json").write_text(json.dumps(workload.to_dict()))
    start = time.monotonic()
    with Watch(workload.base_url, period, look) as watch, (folder / "locust.log").open("w") as log:
        code = subprocess.run(
            locust_command(workload, folder, extra),
            cwd=_ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            check=False,
        ).returncode
    records_file = folder / "records.jsonl"
    if code != 0 or not records_file.is_file():
        raise LocustError(f"locust ended with code {code}:\n{(folder / 'locust.log').read_text()[-_TAIL:]}")
    client_file = folder / "records.client.json"
    return CellRun(
        records=read_records(records_file),
        metrics=watch.to_dict(),
        client=json.loads(client_file.read_text()) if client_file.is_file() else {},
        seconds=time.monotonic() - start,
    )
