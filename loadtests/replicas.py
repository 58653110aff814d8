"""Several servers of one kind behind vLLM's router, for the length of a ``with`` block, and what they say together."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from eos_vllm.cli.server_process import Server, ServerError, free_port, log_tail, serve, stop
from loadtests.grid import Kind
from loadtests.server_metrics import Snapshot, fetch
from loadtests.servers import ServerSpec

# As deploy/local has it: a replica that ended costs no request.
ROUTER_FLAGS = (
    *("--policy", "consistent_hash", "--worker-startup-timeout-secs", "300", "--worker-startup-check-interval", "2"),
    *("--health-check-interval-secs", "2", "--health-failure-threshold", "1", "--cb-failure-threshold", "1"),
    *("--cb-success-threshold", "1", "--cb-timeout-duration-secs", "5"),
)
_START_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """Servers that answer under one address.

    Attributes:
        url: where requests go: a router's, or that of the only server.
        servers: behind it.
    """

    url: str
    servers: tuple[Server, ...]

    @property
    def alive(self) -> bool:
        """Whether all servers' processes run."""
        return all(server.process.poll() is None for server in self.servers)

    def look(self, _: str = "") -> Snapshot:
        """Metrics of all servers, summed; blocks too.

        Raises:
            OSError: one does not answer.
            ValueError: what one answers is no page of metrics.
        """
        return together([fetch(server.url) for server in self.servers])


def together(looks: Sequence[Snapshot]) -> Snapshot:
    """One look from several: every figure is the sum, so that 0 means 0 on each."""
    values: dict[str, float] = {}
    for look in looks:
        for name, value in look.values.items():
            values[name] = values.get(name, 0.0) + value
    blocks = [look.blocks for look in looks if look.blocks is not None]
    return Snapshot(values, sum(blocks) if blocks else None)


@contextmanager
def replicated(spec: ServerSpec, kind: Kind, count: int, folder: Path, profile: Path) -> Iterator[Cluster]:
    """``count`` servers of a kind and vLLM's router in front.

    Args:
        spec: of the servers.
        kind: stock or eos.
        count: servers.
        folder: takes their logs.
        profile: file of the profile, for eos.

    Raises:
        ServerError: one did not start, or there is no router.
    """
    if shutil.which("vllm-router", path=str(Path(sys.executable).parent)) is None:
        raise ServerError("vllm-router is not installed: make setup, or pip install vllm-router")
    with ExitStack() as stack:
        flags = spec.flags(kind, profile)
        started = tuple(
            stack.enter_context(serve(spec.model, flags, folder / f"{kind}-{i}.log", spec.environment))
            for i in range(count)
        )
        url = stack.enter_context(_router([server.url for server in started], folder / f"{kind}-router.log"))
        yield Cluster(url, started)


@contextmanager
def _router(workers: list[str], log: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--worker-urls", *workers, *ROUTER_FLAGS],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
    try:
        while True:
            with suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the router did not come up:\n{log_tail(log)}")
            time.sleep(0.5)
        yield url
    finally:
        stop(process)
