"""The faults themselves: how a stack is prepared for each, what is done to it, and how a fault is played out."""

import asyncio
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import psutil
import stack
from fault_client import Case, Crowd, Outcome, ask
from fault_stack import FaultStack
from hangers import Hangers

from loadtests.server_metrics import fetch

RECOVER_SECONDS = 300.0
AFTER = 20
NAME, REPLICA = "replica-1", stack.REPLICAS[0]
LOG_BYTES = 256 << 10


@dataclass
class Scene:
    """One fault on one running stack."""

    running: FaultStack
    cases: list[Case]
    size: int
    say: Callable[[str], None]
    random: Random
    profile: str
    targets: list[psutil.Process] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    async def play(self, fault: "Fault") -> dict[str, Any]:
        """Fills the stack, brings the fault about, waits for all that was in flight and for recovery."""
        # Looked up now, for that takes longer than many an answer.
        self.targets = fault.targets(self.running) if fault.targets else []
        crowd = Crowd(stack.ROUTER, self.cases, self.size)
        clients = asyncio.create_task(crowd.run())
        # Until clients are in every phase: answered once on average, so that some wait, some prefill, some decode.
        while crowd.in_flight < self.size or len(crowd.outcomes) < self.size:
            await asyncio.sleep(0.1)
            if clients.done():
                clients.result()
        before = Counter(o.kind for o in crowd.outcomes)
        if set(before) - {"right"} - fault.expected:
            self.problems.append(f"before the fault: {dict(before)}")
        started, in_flight = time.monotonic(), crowd.in_flight
        probe = asyncio.create_task(self._probe(started, fault.expected))
        await fault.act(self, crowd)
        crowd.hold.set()
        during = asyncio.create_task(self._trickle(probe))
        await clients
        recovered = await probe
        passed = await during
        after = [await self.one(stack.ROUTER, f"after-{i}", i) for i in range(AFTER)]
        if fault.afterwards:
            await fault.afterwards(self)
        return {
            "in_flight": {
                "requests": in_flight,
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

    async def _probe(self, started: float, expected: frozenset[str]) -> float | None:
        """Seconds until the replica is ready and answers right, three times in a row; 0 where it never failed."""
        good, since, failed = 0, 0.0, False
        while time.monotonic() - started < RECOVER_SECONDS:
            ready = await asyncio.to_thread(is_ready, REPLICA)
            outcome = await self.one(REPLICA, "probe", 0) if ready else None
            if outcome is not None and outcome.kind == "right":
                since = since or outcome.ended
                good += 1
                # A process that was hit may answer once more: only after the crowd can it be told that nothing failed.
                if good >= 3 and (failed or time.monotonic() - started > 10):
                    return round(since - started, 1) if failed else 0.0
            elif outcome is None or outcome.kind not in expected:
                good, since, failed = 0, 0.0, True
            await asyncio.sleep(0.5)
        return None

    async def _trickle(self, probe: "asyncio.Task[float | None]") -> list[Outcome]:
        """One new request each second through the router until the replica has recovered."""
        tasks = []
        while not probe.done():
            tasks.append(asyncio.create_task(self.one(stack.ROUTER, f"during-{len(tasks)}", len(tasks))))
            await asyncio.wait([probe], timeout=1.0)
        return list(await asyncio.gather(*tasks))

    def log_lines(self, *words: str, most: int = 3) -> list[str]:
        """The last lines of the hit replica's log that hold one of the words."""
        found = [line for line in self.running.log(NAME).splitlines() if any(word in line for word in words)]
        return [line[-300:] for line in found[-most:]]


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        what: it is, in the words of the table.
        act: brings it about, on a full stack.
        more: flags of the replicas; ``{n}`` is a limit of which the requests in flight are four times both replicas'.
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
        """Flags of the replicas."""
        return self.more.format(n=max(1, in_flight // 8), t=max(1, in_flight // 8) * 700)

    @contextmanager
    def prepared(self, folder: Path) -> Iterator[tuple[str, Path | None]]:
        """Profile and folder of logs."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.own == "profile":
            source = stack.HERE.parents[1] / "eos_vllm" / "profiles" / "embedded-searched.json"
            file = folder / "theta.json"
            file.write_bytes(source.read_bytes())
            yield str(file), None
        elif self.own == "disk":
            disk = folder / "disk"
            disk.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LOG_BYTES}", "tmpfs", str(disk)], check=True)
            try:
                yield "embedded-searched", disk
            finally:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
        else:
            yield "embedded-searched", None


def is_ready(url: str) -> bool:
    """Whether ``/health`` and ``/eos/status`` both say 200."""
    return stack.is_up(url, "/health") and stack.is_up(url, "/eos/status")


def _details(outcomes: list[Outcome], most: int = 3) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.kind != "right" and len(kept := found.setdefault(outcome.kind, [])) < most:
            kept.append(outcome.detail)
    return found


def worker_of(running: FaultStack) -> list[psutil.Process]:
    """The process that holds the model."""
    return [running.named(NAME, "VLLM::Worker")]


def engine_of(running: FaultStack) -> list[psutil.Process]:
    """The process of the scheduler and, on one rank, of the model."""
    return [running.named(NAME, "VLLM::EngineCore")]


def family_of(running: FaultStack) -> list[psutil.Process]:
    """The API server and all below it."""
    return running.family(NAME)


async def kill(scene: Scene, _: Crowd) -> None:
    """Ends the fault's processes at once, as the kernel does when memory is short."""
    for process in scene.targets:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    scene.say(f"kill -9 of {len(scene.targets)} process(es) of {NAME}")


async def spoil_profile(scene: Scene, crowd: Crowd) -> None:
    """Garbage in the place of the profile, under requests; then a restart, which must refuse it; then it is mended."""
    file = Path(scene.profile)
    good = file.read_bytes()
    file.write_bytes(scene.random.randbytes(2000))
    scene.say("the profile file holds garbage now")
    crowd.hold.set()
    while crowd.in_flight:
        await asyncio.sleep(0.2)
    scene.notes["served with garbage on disk"] = crowd.counts()
    scene.say(f"all in flight are over: {crowd.counts()}; the replica is told to end (SIGTERM), and starts again")
    os.kill(scene.running.pid(NAME), signal.SIGTERM)
    deadline = time.monotonic() + 120
    while (
        not (said := scene.log_lines("--eos-profile", "eos-profile", "profile=", "eos:")[-3:])
        or "error" not in said[-1]
    ):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    scene.notes["a start with garbage says"] = said
    scene.say(f"what the restart says: {said[-1:]}")
    file.write_bytes(good)
    scene.say("the profile file is whole again")


async def fill_disk(scene: Scene, _: Crowd) -> None:
    """Nothing is left on the volume that the replicas log to."""
    disk = scene.running.logs
    try:
        with (disk / "filler").open("wb", buffering=0) as out:
            while True:
                out.write(b"\0" * 4096)
    except OSError as e:
        scene.say(f"the log volume is full: {e.strerror}")
        scene.notes["log volume"] = f"tmpfs of {LOG_BYTES >> 10} KiB: {e.strerror}"
    await asyncio.sleep(10)


async def free_disk(scene: Scene) -> None:
    """Makes room again, and looks whether the log goes on."""
    size = len(scene.running.log(NAME))
    (scene.running.logs / "filler").unlink()
    await scene.one(REPLICA, "log", 0)
    with urllib.request.urlopen(f"{REPLICA}/v1/models", timeout=30):
        await asyncio.sleep(2)
    scene.notes["log goes on when there is room"] = len(scene.running.log(NAME)) > size


async def hang(scene: Scene, crowd: Crowd) -> None:
    """As many further clients as there are requests: one half stops half way in its request, one half never reads."""
    hangers = Hangers(stack.ROUTER, scene.size, scene.cases)
    await hangers.start()
    scene.say(f"{scene.size} clients hang: {hangers.halves} within their request, {hangers.deaf} do not read")
    await asyncio.sleep(15)
    crowd.hold.set()
    while crowd.in_flight:
        await asyncio.sleep(0.2)
    await hangers.stop()
    scene.say("the hanging clients are gone")
    scene.notes["hanging clients"] = {"half a request": hangers.halves, "never read": hangers.deaf}


async def nothing_held(scene: Scene) -> None:
    """Whether all that the hanging clients asked for has been let go."""
    deadline, held = time.monotonic() + 60, {"running": 1.0}
    while any(held.values()) and time.monotonic() < deadline:
        # Gauges are set by steps, so that each look comes behind a request.
        for url in stack.REPLICAS:
            await scene.one(url, "look", 0)
        looks = [await asyncio.to_thread(fetch, url) for url in stack.REPLICAS]
        held = {name: sum(look.values.get(name, 0.0) for look in looks) for name in ("running", "waiting", "kv_usage")}
    scene.notes["held afterwards"] = held
    if any(held.values()):
        scene.problems.append(f"still held a minute later: {held}")


async def flood(scene: Scene, crowd: Crowd) -> None:
    """The crowd itself is the flood: it stays for a while, and readiness is asked meanwhile."""
    since, ready, asked = time.monotonic(), 0, 0
    while time.monotonic() - since < 20:
        ready += sum([await asyncio.to_thread(is_ready, url) for url in stack.REPLICAS])
        asked += 2
        await asyncio.sleep(1)
    good = [o for o in crowd.outcomes if o.kind == "right" and o.first is not None]
    waits = sorted(o.first - o.sent for o in good if o.first is not None)
    decode = sorted(o.ended - o.first for o in good if o.first is not None)
    scene.notes |= {
        "ready": f"{ready} of {asked}",
        "first token, median s": round(waits[len(waits) // 2], 2) if waits else None,
        "first token, worst s": round(waits[-1], 2) if waits else None,
        "decode of an answer, median s": round(decode[len(decode) // 2], 2) if decode else None,
    }
    if ready != asked:
        scene.problems.append(f"ready only {ready} of {asked} times")


_TOLD = frozenset({"told status 503"})
FAULTS = {
    "worker": Fault("a worker process killed", kill, "--distributed-executor-backend mp", targets=worker_of),
    "engine-core": Fault("an engine core killed", kill, targets=engine_of),
    "replica": Fault("a replica killed behind the router", kill, targets=family_of),
    "profile": Fault(
        "the profile file replaced by garbage while serving, then a restart", spoil_profile, own="profile"
    ),
    "disk": Fault("no space on the log volume", fill_disk, own="disk", afterwards=free_disk),
    "hanging": Fault("as many clients hang (half a request, or never read)", hang, afterwards=nothing_held),
    "flood-requests": Fault(
        "4x capacity, limited by requests", flood, "--max-num-seqs {n} --max-num-queued-reqs {n}", expected=_TOLD
    ),
    "flood-tokens": Fault(
        "4x capacity, limited by tokens", flood, "--max-num-seqs {n} --max-num-queued-tokens {t}", expected=_TOLD
    ),
    "flood-queued": Fault("4x capacity, without limits", flood, "--max-num-seqs {n}"),
}
