"""``make page-fuzz``: schemathesis against every ``/eos/`` path of a live server; no answer may be a 5xx.

schemathesis is no dependency of the project, for it pins what the tests use as well: the command that runs it is given.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from page_browser import KEY, PROFILE

from eos_vllm import __version__
from eos_vllm.cli.page import embedded_flags
from eos_vllm.cli.server_process import serve
from eos_vllm.models import embedded

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


def document(url: str, file: Path) -> dict[str, list[str]]:
    """Writes the part of the server's OpenAPI document below ``/eos/``; its methods by path."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=30) as answer:
        schema: dict[str, Any] = json.loads(answer.read())
    schema["paths"] = {path: item for path, item in schema["paths"].items() if path.startswith("/eos/")}
    file.write_text(json.dumps(schema), encoding="utf-8")
    return {path: sorted(method.upper() for method in item) for path, item in schema["paths"].items()}


def main() -> int:
    """Runs rounds until the time is over; the exit code of the first one that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis", help="command that runs it")
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "page-fuzz.txt")
    args = parser.parse_args()
    version = subprocess.run(
        [args.schemathesis, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(embedded.path(), [*embedded_flags(PROFILE), "--api-key", KEY], folder / "log") as server:
            paths = document(server.url, folder / "openapi.json")
            command = [args.schemathesis, "run", str(folder / "openapi.json"), "--url", server.url]
            command += [
                "--header",
                f"Authorization: Bearer {KEY}",
                "--checks",
                "not_a_server_error,response_schema_conformance",
            ]
            command += ["--continue-on-failure", "--no-color", "--max-examples", "400"]
            start, rounds, code, cases = time.monotonic(), 0, 0, 0
            last = ""
            while time.monotonic() - start < args.seconds and code == 0:
                rounds += 1
                done = subprocess.run([*command, "--seed", str(rounds)], capture_output=True, text=True, check=False)
                last, code = done.stdout, done.returncode
                cases += sum(map(int, re.findall(r"(\d+) generated", last)))
            elapsed = time.monotonic() - start
            alive = json.loads(urllib.request.urlopen(request(server.url), timeout=30).read())["status"]
            server_log = (folder / "log").read_text(errors="replace")
    lines = [
        f"eos-vllm {__version__}, {version}, profile {PROFILE}, with an API key",
        *(f"{' '.join(methods)} {path}" for path, methods in sorted(paths.items())),
        f"{rounds} rounds with seeds 1 to {rounds}, {elapsed:.0f} s, {cases} cases",
        f"answers of 5xx or off the schema: {'none' if code == 0 else 'see below'}",
        f"the server afterwards: {alive}; tracebacks in its log: {server_log.count('Traceback')}",
        "",
        "Last round:",
        re.sub(r"file:\S*|/\S*/openapi\.json", "openapi.json", last).strip(),
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return code


def request(url: str) -> urllib.request.Request:
    """For the server's status."""
    return urllib.request.Request(f"{url}/eos/status", headers={"Authorization": f"Bearer {KEY}"})


if __name__ == "__main__":
    sys.exit(main())
