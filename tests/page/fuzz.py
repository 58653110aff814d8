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
from dataclasses import dataclass
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


@dataclass
class Fuzz:
    """What came of it: rounds, cases and seconds; the exit code and the text of the last round."""

    rounds: int = 0
    cases: int = 0
    seconds: float = 0.0
    code: int = 0
    text: str = ""


def fuzz(command: list[str], seconds: int) -> Fuzz:
    """Runs schemathesis with one seed after another until the time is over, or until it finds something."""
    found, start = Fuzz(), time.monotonic()
    while found.seconds < seconds and found.code == 0:
        found.rounds += 1
        left = max(5, round(seconds - found.seconds))
        now = [*command, "--seed", str(found.rounds), "--max-time", str(left)]
        done = subprocess.run(now, capture_output=True, text=True, check=False)
        found.code, found.text = done.returncode, done.stdout + done.stderr
        found.cases += sum(map(int, re.findall(r"(\d+) generated", done.stdout)))
        found.seconds = time.monotonic() - start
    return found


def main() -> int:
    """Writes what came of it; the exit code of the last round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis", help="command that runs it")
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "page-fuzz.txt")
    args = parser.parse_args()
    version = subprocess.check_output([args.schemathesis, "--version"], text=True).strip()
    with (
        tempfile.TemporaryDirectory() as name,
        serve(embedded.path(), [*embedded_flags(PROFILE), "--api-key", KEY], Path(name) / "log") as server,
    ):
        schema = Path(name) / "openapi.json"
        paths = document(server.url, schema)
        command = [args.schemathesis, "run", str(schema), "--url", server.url, "--no-color", "--continue-on-failure"]
        command += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", "400"]
        found = fuzz([*command, "--checks", "not_a_server_error,response_schema_conformance"], args.seconds)
        alive = status(server.url)
        tracebacks = server.log.read_text(errors="replace").count("Traceback")
    lines = [
        f"eos-vllm {__version__}, {version}, profile {PROFILE}, with an API key",
        *(f"{' '.join(methods)} {path}" for path, methods in sorted(paths.items())),
        f"{found.rounds} rounds, seeds from 1, {found.seconds:.0f} s, {found.cases} cases",
        f"answers of 5xx or off the schema: {'none' if found.code == 0 else 'below'}",
        f"the server afterwards: {alive}; tracebacks in its log: {tracebacks}",
        "",
        "Last round:",
        re.sub(r"\S*openapi\.json", "openapi.json", found.text).strip(),
    ]
    text = "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
    args.out.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return found.code


def status(url: str) -> str:
    """Whether the reduction is still in place."""
    asked = urllib.request.Request(f"{url}/eos/status", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return str(json.loads(answer.read())["status"])


if __name__ == "__main__":
    sys.exit(main())
