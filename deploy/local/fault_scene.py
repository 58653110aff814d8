"""How a fault is played out: a full stack, the fault, what clients get meanwhile, and when all is well again."""

import asyncio
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import psutil
import stack
from fault_client import Case, Crowd, Outcome, ask
from fault_stack import FaultStack

RECOVER_SECONDS = 300.0
QUIET_SECONDS = 10.0
AFTER = 20
NAME, REPLICA = "replica-1", stack.REPLICAS[0]
# Room for the logs of all faults but the one that fills it.
LOG_BYTES = 64 << 20


@dataclass
class Scene:
    """One fault on one running stack.

    Attributes:
        running: the stack.
        cases: what is asked.
        size: requests in flight.
        say: logs a line.
        random: of the run's seed.
        profile: name or file of the profile.
        targets: processes that the fault hits.
        since: when the replica was hit, from which its recovery counts.
        acted: when all that belongs to the fault had been done.
        notes: further figures and lines for the result.
        problems: what may not be.
    """

    running: FaultStack
    cases: list[Case]
    size: int
    say: Callable[[str], None]
    random: Random
    profile: str
    targets: list[psutil.Process] = field(default_factory=list)
    since: float = 0.0
    acted: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    async def play(self, fault: "Fault") -> dict[str, Any]:
        """Fills the stack, brings the fault about, waits for all that was in flight and for recovery."""
        # Looked up now, for that takes longer than many an answer.
        self.targets = fault.targets(self.running) if fault.targets else []
        crowd = Crowd(stack.ROUTER, self.cases, self.size)
        clients = asyncio.create_task(crowd.run())
        # Until clients are in every phase: answered once on average, so that some wait, some prefill, some decode.
        # Where some are refused, those wait before they ask again.
        # Streams that have begun are what no router can send elsewhere, so many of them have to be there.
        streams = self.size // 16
        while len(crowd.outcomes) < self.size or (
            not fault.expected and (crowd.in_flight < self.size or crowd.streaming < streams)
        ):
            await asyncio.sleep(0.1)
            if clients.done():
                clients.result()
        before = Counter(o.kind for o in crowd.outcomes)
        if set(before) - {"right"} - fault.expected:
            self.problems.append(f"before the fault: {dict(before)}")
        self.since, in_flight, streaming = time.monotonic(), crowd.in_flight, crowd.streaming
        started = self.since
        self.say(f"{in_flight} requests in flight, the answers of {streaming} have begun")
        probe = asyncio.create_task(self._probe(fault.expected))
        during = asyncio.create_task(self._trickle(probe))
        await fault.act(self, crowd)
        crowd.hold.set()
        self.acted = time.monotonic()
        await clients
        recovered = await probe
        passed = await during
        after = [await self.one(stack.ROUTER, f"after-{i}", i) for i in range(AFTER)]
        if fault.afterwards:
            await fault.afterwards(self)
        return {
            "in_flight": {
                "requests": in_flight,
                "streams": streaming,
                "outcomes": crowd.counts(started),
                "details": _details(crowd.outcomes),
            },
            "before": dict(before),
            "during": {"outcomes": dict(Counter(o.kind for o in passed)), "details": _details(passed)},
            "after": {"outcomes": dict(Counter(o.kind for o in after)), "details": _details(after)},
            "recover_seconds": recovered,
            "notes": self.notes,
            "problems": self.problems,
        }

    async def one(self, url: str, name: str, number: int, limit: float = 180.0) -> Outcome:
        """One question over a connection of its own."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            return await ask(
                session, url, self.cases[number % len(self.cases)], name, long=number % 2 == 1, limit=limit
            )

    async def _probe(self, expected: frozenset[str]) -> float | None:
        """Seconds until the replica is ready and answers right, and so does the router; 0 where neither ever failed.

        Three times in a row, and where nothing failed not before ten seconds have passed, for a process that was hit
        may answer once more. None where that does not come.
        """
        good, first, failed = 0, 0.0, False
        while time.monotonic() - self.since < RECOVER_SECONDS:
            kinds = ["not ready"]
            if await asyncio.to_thread(is_ready, REPLICA):
                kinds = [(await self.one(url, f"probe-{time.monotonic()}", 0)).kind for url in (REPLICA, stack.ROUTER)]
            if set(kinds) == {"right"}:
                first = first or time.monotonic()
                good += 1
                if good >= 3 and self.acted is not None:
                    if failed:
                        return round(first - self.since, 1)
                    if time.monotonic() - self.acted > QUIET_SECONDS:
                        return 0.0
            elif not set(kinds) <= expected | {"right"}:
                good, first, failed = 0, 0.0, True
            await asyncio.sleep(0.5)
        return None

    async def _trickle(self, probe: "asyncio.Task[float | None]") -> list[Outcome]:
        """One new request each second through the router until the replica has recovered."""
        tasks: list[asyncio.Task[Outcome]] = []
        while not probe.done():
            tasks.append(asyncio.create_task(self.one(stack.ROUTER, f"during-{len(tasks)}", len(tasks))))
            await asyncio.wait([probe], timeout=1.0)
        return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        what: it is, in the words of the table.
        act: brings it about, on a full stack.
        more: further flags of the replicas; ``{n}`` is what one runs at once, ``{t}`` tokens of about as many,
            reduced.
        own: what the stack needs beside it: ``profile`` (a file of its own) or ``disk`` (a small one for logs).
        expected: outcomes that are no surprise before the fault.
        afterwards: is done when everything is over.
        targets: the processes that it hits.
    """

    what: str
    act: Callable[[Scene, Crowd], Awaitable[None]]
    more: str = ""
    own: str = ""
    expected: frozenset[str] = frozenset()
    afterwards: Callable[[Scene], Awaitable[None]] | None = None
    targets: Callable[[FaultStack], list[psutil.Process]] | None = None

    def flags(self, in_flight: int) -> str:
        """Flags of the replicas: both together run a quarter of the requests in flight at once."""
        n = max(1, in_flight // 8)
        return f"--max-num-seqs {n} {self.more.format(n=n, t=400 * n)}".strip()


@contextmanager
def prepared(folder: Path, own: Collection[str]) -> Iterator[tuple[str, Path | None]]:
    """Profile and folder of logs for a stack.

    Args:
        folder: of the stack.
        own: what its faults need: ``profile``, ``disk``.

    Raises:
        StackError: the small disk cannot be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = "embedded-searched"
    if "profile" in own:
        source = stack.HERE.parents[1] / "eos_vllm" / "profiles" / f"{profile}.json"
        profile = str(folder / "theta.json")
        Path(profile).write_bytes(source.read_bytes())
    if "disk" not in own:
        yield profile, None
        return
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LOG_BYTES}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise stack.StackError(f"the small disk cannot be mounted ({mounted.stderr.strip()}); run it as root")
    try:
        yield profile, disk
    finally:
        for log in disk.glob("*.log"):
            shutil.copy(log, folder)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def is_ready(url: str) -> bool:
    """Whether ``/health`` and ``/eos/status`` both say 200."""
    return stack.is_up(url, "/health") and stack.is_up(url, "/eos/status")


def _details(outcomes: list[Outcome], most: int = 3) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.kind != "right" and len(kept := found.setdefault(outcome.kind, [])) < most:
            kept.append(outcome.detail)
    return found
