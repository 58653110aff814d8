"""``make up`` and ``make down``: two replicas, router and Prometheus as processes of one supervisord.

``python deploy/local/stack.py up|down``. Logs and data: ``runs/local``, or the folder that ``EOS_STACK`` names. Ports:
8100 and above, or as many above ``EOS_PORT``.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("EOS_STACK", HERE.parents[1] / "runs" / "local")).resolve()
BIN = Path(sys.executable).parent
PORT = int(os.environ.get("EOS_PORT", "8100"))


def shifted(text: str) -> str:
    """The text with its ports 8100 to 8199 as many above ``EOS_PORT``."""
    return re.sub(r"\b81\d\d\b", lambda port: str(int(port[0]) - 8100 + PORT), text)


ROUTER, PROMETHEUS = shifted("http://127.0.0.1:8100"), shifted("http://127.0.0.1:8190")
REPLICAS = (shifted("http://127.0.0.1:8101"), shifted("http://127.0.0.1:8102"))
# Where each says that it is there. vLLM's servers answer only after proof and rehearsal.
READY = dict.fromkeys((*REPLICAS, ROUTER), "/health") | {PROMETHEUS: "/-/ready"}
START_SECONDS = 600


class StackError(RuntimeError):
    """Something is missing, or did not come up; the text says what and where to look."""


def supervisor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``supervisorctl``; its exit code counts programs that do not run."""
    return _run("supervisorctl", *arguments)


def is_up(url: str, path: str) -> bool:
    """Whether ``GET url/path`` is answered with 200."""
    try:
        with urllib.request.urlopen(f"{url}{path}", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_until_up(*urls: str) -> None:
    """Waits until all of them answer.

    Raises:
        StackError: one does not within ten minutes.
    """
    deadline = time.monotonic() + START_SECONDS
    for url in urls:
        while not is_up(url, READY[url]):
            if time.monotonic() > deadline:
                raise StackError(f"{url} is not up after {START_SECONDS} s; logs are in {FOLDER}")
            time.sleep(1)


def up() -> None:
    """Starts all, and waits.

    Raises:
        StackError: a program is not installed, or something did not come up.
    """
    if shutil.which("prometheus") is None:
        raise StackError("prometheus is not installed: apt-get install prometheus, or put its binary into PATH")
    for name, remedy in (("supervisord", "pip install supervisor"), ("vllm-router", "pip install vllm-router")):
        if shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None:
            raise StackError(f"{name} is not installed: make setup, or {remedy}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if supervisor("pid").returncode == 0:
        raise StackError("it is up already; make down ends it")
    started = _run("supervisord")
    if started.returncode:
        raise StackError(f"supervisord: {started.stderr.strip()}")
    wait_until_up(*READY)


def down() -> None:
    """Ends all; requests in flight have 30 s.

    Raises:
        StackError: it is not up.
    """
    pid = supervisor("pid")
    if pid.returncode:
        raise StackError("it is not up")
    supervisor("shutdown")
    while Path(f"/proc/{int(pid.stdout)}").exists():
        time.sleep(0.5)


def configuration() -> Path:
    """The configuration of supervisord: the one beside this file, or with other ports a copy in the stack's folder."""
    if shifted("8100") == "8100":
        return HERE / "supervisord.conf"
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "prometheus.yml").write_text(
        shifted((HERE / "prometheus.yml").read_text(encoding="utf-8")).replace(
            "../monitoring", str(HERE.parent / "monitoring")
        ),
        encoding="utf-8",
    )
    text = shifted((HERE / "supervisord.conf").read_text(encoding="utf-8"))
    text = text.replace("%(here)s/prometheus.yml", str(FOLDER / "prometheus.yml")).replace("%(here)s", str(HERE))
    file = FOLDER / "supervisord.conf"
    file.write_text(text, encoding="utf-8")
    return file


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(program, configuration(), *arguments)


def run(program: str, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of supervisor with a configuration and the variables that it names."""
    # Where drill.py puts its plugin; supervisord wants every variable that its configuration names.
    paths = filter(None, [str(FOLDER / "plugins"), str(HERE.parents[1] / "tests"), os.environ.get("PYTHONPATH")])
    variables = {**os.environ, "EOS_BIN": str(BIN), "EOS_STACK": str(FOLDER), "EOS_BREAKING": os.pathsep.join(paths)}
    command = [str(BIN / program), "-c", str(config), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def main(action: str) -> int:
    """Runs one of both; 1 and one line where it cannot."""
    try:
        {"up": up, "down": down}[action]()
    except StackError as e:
        print(f"stack: {e}", file=sys.stderr)
        return 1
    if action == "up":
        print(f"router {ROUTER}/v1 (model: embedded), replicas {', '.join(REPLICAS)}, Prometheus {PROMETHEUS}")
        print(f"logs and data in {FOLDER}; make down ends it")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["up"], ["down"]):
        sys.exit("usage: stack.py up|down")
    sys.exit(main(sys.argv[1]))
