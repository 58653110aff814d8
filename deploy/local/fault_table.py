"""The table of faults in docs/operations.md, drawn from results/faults.json: ``python deploy/local/fault_table.py``."""

import json
import sys
from pathlib import Path
from typing import Any

from eos_vllm.provenance import commit_line, machine_line

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- faults: drawn from results/faults.json -->", "<!-- end of faults -->"
FLOODED = (
    "a replica refuses what is above its limit with 503, as a status or within a stream that has begun; its first one "
    "opens the router's breaker, and with both open the router says 503 itself until they are tried again (2 s)"
)
# What each does to the service; the figures beside it are measured.
HAPPENS = {
    "worker": "its engine core sees it and ends, streams under way end with an error, the API server ends with exit "
    "code 0; supervisord starts it again, meanwhile the router sends all to the other replica",
    "engine-core": "streams under way end with an error, the API server ends with exit code 0; then the same",
    "replica": "streams under way break; then the same",
    "profile": "the running replica goes on with the profile it read at its start; a start with garbage ends with one "
    "line that names the file (exit code 2), the first one after it is mended serves (time of both starts)",
    "disk": "lines of the log are lost, requests are not; the log goes on when there is room",
    "hanging": "others are answered; what was sent whole is computed, and nothing of it stays",
    "flood-requests": FLOODED,
    "flood-tokens": FLOODED,
    "flood-queued": "requests wait; none is refused",
}


def counted(outcomes: dict[str, int]) -> str:
    """``180 right, 20 told (status 503: 12, …)``."""
    told = {kind.removeprefix("told "): count for kind, count in outcomes.items() if kind.startswith("told ")}
    other = [f"{count} {kind}" for kind, count in outcomes.items() if not kind.startswith("told ")]
    if told:
        other.append(f"{sum(told.values())} told ({', '.join(f'{kind}: {count}' for kind, count in told.items())})")
    return ", ".join(other)


def happens(result: dict[str, Any]) -> str:
    """What a fault does, with what was measured beside it."""
    text, notes = HAPPENS[result["name"]], result["notes"]
    if waited := notes.get("first token, median s"):
        worst, ready = notes["first token, worst s"], notes["ready"]
        text += f"; answers begin after {waited:g} s (median) and {worst:g} s at worst; replicas ready in {ready} looks"
    return text


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each fault, and what they ran on."""
    lines = [
        "| fault | what happens | requests in flight | new ones until recovery | s to recover |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        flight, during = counted(result["in_flight"]["outcomes"]), counted(result["during"]["outcomes"])
        recover = result["recover_seconds"]
        lines.append(
            f"| {result['what']} | {happens(result)} | {flight} | {during} "
            f"| {'never' if recover is None else f'{recover:g}' if recover else 'never away'} |"
        )
    loads = [result["load_average"] for result in results]
    machines = {machine_line(result["provenance"]) for result in results}
    commits = {commit_line(result["provenance"]) for result in results}
    lines += [
        "",
        f"{'; '.join(sorted(machines))}, with other work on it: load average {min(loads):g} to {max(loads):g}. "
        f"Revision {', '.join(sorted(commits))}.",
    ]
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
