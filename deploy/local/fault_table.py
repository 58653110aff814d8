"""The table of faults in docs/operations.md, drawn from results/faults.json: ``python deploy/local/fault_table.py``."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- faults: drawn from results/faults.json -->", "<!-- end of faults -->"
# What each does to the service; the figures beside it are measured.
HAPPENS = {
    "worker": "the engine core ends the engine, the API server ends, supervisord starts it again",
    "engine-core": "the API server fails what it had and ends, supervisord starts it again",
    "replica": "its connections break; supervisord starts it again",
    "profile": "the running replica holds its profile in memory; a start with garbage is refused with one line",
    "disk": "log lines are lost, requests are not",
    "hanging": "others are served; what hangs costs a connection, and a request's KV where it was sent whole",
    "flood-requests": "status 503 above the limit, at once",
    "flood-tokens": "status 503 above the limit, at once",
    "flood-queued": "requests wait; none is refused",
}


def counted(outcomes: dict[str, int]) -> str:
    """``180 right, 20 told (status 503: 12, …)``."""
    told = {kind.removeprefix("told "): count for kind, count in outcomes.items() if kind.startswith("told ")}
    other = [f"{count} {kind}" for kind, count in outcomes.items() if not kind.startswith("told ")]
    if told:
        other.append(f"{sum(told.values())} told ({', '.join(f'{kind}: {count}' for kind, count in told.items())})")
    return ", ".join(other)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each fault."""
    lines = [
        "| fault | what happens | requests in flight | new ones until recovery | s to recover |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        flight, during = counted(result["in_flight"]["outcomes"]), counted(result["during"]["outcomes"])
        recover = result["recover_seconds"]
        lines.append(
            f"| {result['what']} | {HAPPENS[result['name']]} | {flight} | {during} "
            f"| {'never' if recover is None else f'{recover:g}' if recover else 'never away'} |"
        )
    return "\n".join(lines)


def put(page: Path, results: list[dict[str, Any]]) -> None:
    """Replaces what stands between the marks.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.name} lacks the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    read = json.loads((ROOT / "results" / "faults.json").read_text(encoding="utf-8"))
    put(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "operations.md", read["faults"])
