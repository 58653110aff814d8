"""A ``vllm serve`` of one's own: start it, wait until it is healthy, end it. Used by demo, tests and benchmarks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 300
STOP_SECONDS = 60


class ServerError(RuntimeError):
    """The server ended, or did not become healthy in time; the text holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process and its log file."""

    url: str
    process: subprocess.Popen
    log: Path

    def text(self, path: str) -> str:
        """Body of ``GET path``."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
            return response.read().decode()


def vllm_command(*arguments: str) -> list[str]:
    """The ``vllm`` command of this very environment, else that of PATH: distributions keep scripts apart from Python.

    Raises:
        ServerError: there is none.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ServerError(f"there is no command vllm beside {sys.executable} or in PATH; see eos-vllm doctor")
    return [found, *arguments]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serve(
    model: str | Path,
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Runs ``vllm serve model arguments`` on a loopback port for the length of a ``with`` block.

    Args:
        model: model directory or name.
        arguments: further flags.
        log: file that takes the server's output.
        environment: variables to set on top of this process'.
        port: to listen on; a free one where None.

    Raises:
        ServerError: it ended while starting, or was not healthy after 300 s.
    """
    port = free_port() if port is None else port
    command = vllm_command("serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments)
    # Engines run in processes of their own here, whatever the caller's tests have set.
    variables = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        stop(process)


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"vllm serve ended with code {server.process.returncode}:\n{log_tail(server.log)}")
        try:
            server.text("/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ServerError(f"vllm serve was not healthy after {START_SECONDS} s:\n{log_tail(server.log)}")


def stop(process: subprocess.Popen) -> None:
    """Ends the server as Ctrl-C does; what is left of its process group after a minute is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
