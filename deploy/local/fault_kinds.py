"""The faults themselves: what is done to a stack, and what is looked at for it."""

import asyncio
import os
import signal
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import stack
from fault_client import Crowd
from fault_scene import LOG_BYTES, NAME, REPLICA, Fault, Scene, is_ready
from fault_stack import FaultStack
from hangers import Hangers

from loadtests.server_metrics import fetch


def worker_of(running: FaultStack) -> list[psutil.Process]:
    """The process that holds the model."""
    return [running.named(NAME, "VLLM::Worker")]


def engine_of(running: FaultStack) -> list[psutil.Process]:
    """The process of the scheduler."""
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
    logged = len(scene.running.log(NAME))
    scene.since = time.monotonic()
    os.kill(scene.running.pid(NAME), signal.SIGTERM)
    scene.say(f"all in flight are over: {crowd.counts()}; the replica is told to end (SIGTERM), and starts again")
    said: list[str] = []
    deadline = time.monotonic() + 120
    while not said and time.monotonic() < deadline:
        await asyncio.sleep(1)
        new = scene.running.log(NAME)[logged:].splitlines()
        said = [line for line in new if "error" in line.lower() and (file.name in line or "eos-profile" in line)]
    if said:
        scene.notes["a start with garbage says"] = said[0].replace(str(file.parent), "…")[-400:]
        scene.say(f"the restart says: {scene.notes['a start with garbage says']}")
    else:
        scene.problems.append("the restart with garbage did not say what is wrong")
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
        scene.notes["log volume"] = f"tmpfs of {LOG_BYTES >> 20} MiB: {e.strerror}"
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


_TOLD = frozenset({"told status 503", "told status 503 in the stream"})
FAULTS = {
    "worker": Fault("a worker process killed", kill, targets=worker_of),
    "engine-core": Fault("an engine core killed", kill, targets=engine_of),
    "replica": Fault("a replica killed behind the router", kill, targets=family_of),
    "profile": Fault(
        "the profile file replaced by garbage while serving, then a restart", spoil_profile, own="profile"
    ),
    "disk": Fault("no space on the log volume", fill_disk, own="disk", afterwards=free_disk),
    "hanging": Fault("as many clients hang (half a request, or never read)", hang, afterwards=nothing_held),
    "flood-requests": Fault("4x capacity, limited by requests", flood, "--max-num-queued-reqs {n}", expected=_TOLD),
    "flood-tokens": Fault("4x capacity, limited by tokens", flood, "--max-num-queued-tokens {t}", expected=_TOLD),
    "flood-queued": Fault("4x capacity, without limits", flood),
}
