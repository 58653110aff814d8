"""The stack for faults: two replicas behind the real router under supervisord, with further flags and a log folder.

The programs are those of ``supervisord.conf``, ports and folder as ``stack.py`` has them (``EOS_PORT``, ``EOS_STACK``);
Prometheus and the drill's programs stay out.
"""

import time
from collections.abc import Iterator
from configparser import RawConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import stack

PROGRAMS = ("replica-1", "replica-2", "router")
PROFILE = "--eos-profile embedded-searched"


@dataclass(frozen=True)
class FaultStack:
    """A running stack.

    Attributes:
        config: supervisord's configuration.
        logs: folder of the replicas' logs.
    """

    config: Path
    logs: Path

    def pid(self, program: str) -> int:
        """Process of a program.

        Raises:
            StackError: it does not run.
        """
        found = stack.run("supervisorctl", self.config, "pid", program).stdout.strip()
        if not found.isdigit() or found == "0":
            raise stack.StackError(f"{program} does not run: {found}")
        return int(found)

    def family(self, program: str) -> list[psutil.Process]:
        """Its process and all that descend from it."""
        process = psutil.Process(self.pid(program))
        return [process, *process.children(recursive=True)]

    def named(self, program: str, title: str) -> psutil.Process:
        """The one process of a program whose title holds ``title`` (vLLM names its processes).

        Raises:
            StackError: there is none.
        """
        for process in self.family(program):
            if title in " ".join(process.cmdline()) or title in process.name():
                return process
        seen = [" ".join(p.cmdline())[:60] for p in self.family(program)]
        raise stack.StackError(f"{program} has no process {title}: {seen}")

    def log(self, program: str) -> str:
        """What a program has logged."""
        return (self.logs / f"{program}.log").read_text(encoding="utf-8", errors="replace")


def write_configuration(flags: str, profile: str, logs: Path) -> Path:
    """Takes replicas and router out of ``supervisord.conf``.

    Args:
        flags: further flags of both replicas.
        profile: name or file for ``--eos-profile``.
        logs: folder of the replicas' logs.
    """
    source = RawConfigParser(inline_comment_prefixes=None)
    source.read_string(stack.shifted((stack.HERE / "supervisord.conf").read_text(encoding="utf-8")))
    for section in source.sections():
        if section.startswith("program:") and section.removeprefix("program:") not in PROGRAMS:
            source.remove_section(section)
    source["supervisord"]["directory"] = str(stack.HERE.parents[1])
    for name in PROGRAMS[:2]:
        program = source[f"program:{name}"]
        assert PROFILE in program["command"]
        command = " ".join(program["command"].split()).replace(PROFILE, f"--eos-profile {profile}")
        program["command"] = f"{command} {flags}".strip()
        program["stdout_logfile"] = str(logs / f"{name}.log")
        # A log that is turned over would hide what a full disk does to the one that is written.
        program["stdout_logfile_maxbytes"] = "0"
        # When all is over nothing is under way that a drain could save.
        program["stopwaitsecs"] = "10"
    router = source["program:router"]
    router["command"] = " ".join(router["command"].split())
    file = stack.FOLDER / "faults.conf"
    with file.open("w", encoding="utf-8") as out:
        source.write(out)
    return file


@contextmanager
def running(flags: str = "", profile: str = "embedded-searched", logs: Path | None = None) -> Iterator[FaultStack]:
    """Starts the stack, waits until replicas and router answer, and ends it.

    Raises:
        StackError: something did not come up.
    """
    stack.FOLDER.mkdir(parents=True, exist_ok=True)
    logs = logs or stack.FOLDER
    config = write_configuration(flags, profile, logs)
    started = stack.run("supervisord", config)
    if started.returncode:
        raise stack.StackError(f"supervisord: {started.stderr.strip()}")
    pid = int(stack.run("supervisorctl", config, "pid").stdout)
    try:
        stack.wait_until_up(*stack.REPLICAS, stack.ROUTER)
        yield FaultStack(config, logs)
    finally:
        family = psutil.Process(pid).children(recursive=True)
        stack.run("supervisorctl", config, "shutdown")
        deadline = time.monotonic() + 90
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in family:
            if process.is_running():
                process.kill()
