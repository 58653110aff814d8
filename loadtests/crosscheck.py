"""The same requests by locust, by ``vllm bench serve`` and, where it is installed, by guidellm: do they agree?

    python -m loadtests.crosscheck --out results/crosscheck-cpu.json         # six minutes on 2 cores, ten with guidellm

All testers take turns on the same servers, stock and eos at one budget. Figures agree where their ranges over repeats,
widened by the tolerance, touch.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.cell import LocustError, run_cell
from loadtests.commands import command, parser_of
from loadtests.figures import Steady
from loadtests.grid import Kind, Load
from loadtests.measures import percentile
from loadtests.origin import origin
from loadtests.peers import PeerFigures, guidellm, guidellm_command, vllm_bench
from loadtests.questions import export_benchmark
from loadtests.settings import Workload, at_least_one
from loadtests.subjects import serving, speed_subject
from loadtests.sweep_options import EAGER, PROMPT_CHARACTERS, SweepOptions

FIGURES = ("requests_per_second", "ttft", "tpot")
_TOLERANCE = 0.05


@command("crosscheck")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cross-check; 0 if all testers agree, 1 if not or if one failed, 2 for a mistake of the user."""
    parser = parser_of("crosscheck", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/crosscheck-cpu.json"), help="default: %(default)s")
    parser.add_argument("--preset", default="bench-88m")
    parser.add_argument("--retain", type=int, default=64, help="budget of the eos server (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="per run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    options = SweepOptions(
        args.out, preset=args.preset, scenarios=("single",), loads=(Load(args.concurrency),), server_arguments=EAGER
    )
    for name in ("requests", "repeats", "retain"):
        at_least_one(name, getattr(args, name))
    runs = measure(options, args.retain, args.requests, args.repeats)
    comparison = compare(runs)
    load = options.loads[0]
    result = {
        "provenance": origin(seed=options.seed),
        "settings": {**options.to_dict(), "budget": args.retain, "requests": args.requests, "load": asdict(load)},
        "guidellm": "installed" if guidellm_command() else "not installed: left out",
        "runs": runs,
        "comparison": comparison,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(comparison))
    return 0 if all(row["agrees"] for row in comparison) else 1


def measure(options: SweepOptions, budget: int, requests: int, repeats: int) -> list[dict[str, Any]]:
    """Runs every tester on both servers, in turn, ``repeats`` times.

    Raises:
        ServerError, LocustError, PeerError: something ended badly.
    """
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="eos-cross-") as name:
        folder = Path(name)
        subject = speed_subject(options, folder)
        load = options.loads[0]
        with serving(options, subject) as (pair, served):
            testers = _testers(str(subject.model))
            kinds: tuple[Kind, ...] = ("stock", "eos")
            number = (repeats + 1) * len(kinds) * len(testers)
            parts = iter(split_rows(export_benchmark(folder / "rows", requests * number), number))
            for repeat in range(repeats + 1):
                for kind in kinds:
                    for tester, run in testers.items():
                        # Nobody sends an image that a server knows from another run; the first round warms up.
                        label = f"{repeat} {kind} {tester} {time.time():.0f}"
                        workload = Workload(
                            base_url=pair.url(kind),
                            model=served,
                            rows=str(next(parts)),
                            concurrency=load.concurrency,
                            requests=requests if repeat else load.concurrency,
                            budgets=() if kind == "stock" else (budget,),
                            label=label,
                            output_tokens=options.output_tokens,
                            prompt_characters=PROMPT_CHARACTERS,
                            seed=options.seed + repeat,
                        )
                        figures = run(workload, folder / label.replace(" ", "-"))
                        if repeat:
                            runs.append({"server": kind, "tester": tester, "repeat": repeat} | asdict(figures))
                            print(f"{kind} {tester} {repeat}: {figures.requests_per_second:.3f}/s", file=sys.stderr)
    return runs


def split_rows(rows: Path, parts: int) -> list[Path]:
    """Deals the images of a JSONL out, with all questions about each, to files beside it that share no image."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    seen: dict[str, int] = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        image = str(json.loads(line)["image_files"])
        dealt[seen.setdefault(image, len(seen)) % parts].append(line)
    files = [rows.with_name(f"part-{number}.jsonl") for number in range(parts)]
    for file, lines in zip(files, dealt, strict=True):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _testers(tokenizer: str) -> dict[str, Callable[[Workload, Path], PeerFigures]]:
    found: dict[str, Callable[[Workload, Path], PeerFigures]] = {
        "locust": by_locust,
        "vllm bench serve": lambda workload, folder: vllm_bench(workload, folder, tokenizer),
    }
    if (command := guidellm_command()) is not None:
        found["guidellm"] = lambda workload, folder: guidellm(workload, folder, command)
    return found


def by_locust(workload: Workload, folder: Path) -> PeerFigures:
    """Our own figures of one run, in the form of the others.

    Raises:
        LocustError: it ended badly, or nothing was answered.
    """
    run = run_cell(workload, folder)
    steady = Steady.of(run.records, run.client)
    ttft = percentile((r.ttft for r in steady.full if r.ttft is not None), 50)
    tpot = percentile((r.tpot for r in steady.full if r.tpot is not None), 50)
    if ttft is None or tpot is None:
        causes = sorted({record.cause or "" for record in run.records})
        raise LocustError(f"no request was answered: {', '.join(causes)}")
    return PeerFigures(len(steady.full), steady.requests_per_second, ttft, tpot)


def compare(runs: Sequence[dict[str, Any]], tolerance: float = _TOLERANCE) -> list[dict[str, Any]]:
    """Each other tester's range of each figure against locust's, on each server.

    Args:
        runs: figures of single runs, with server and tester.
        tolerance: share by which each end of a range is widened.

    Returns:
        A row for each server, tester and figure: both ranges, and whether they touch.
    """
    rows = []
    for server in dict.fromkeys(run["server"] for run in runs):
        for tester in dict.fromkeys(run["tester"] for run in runs if run["tester"] != "locust"):
            for figure in FIGURES:
                ours, theirs = (
                    [run[figure] for run in runs if run["server"] == server and run["tester"] == who]
                    for who in ("locust", tester)
                )
                if not ours or not theirs:
                    continue
                touch = min(ours) * (1 - tolerance) <= max(theirs) * (1 + tolerance)
                touch = touch and min(theirs) * (1 - tolerance) <= max(ours) * (1 + tolerance)
                rows.append(
                    {
                        "server": server,
                        "tester": tester,
                        "figure": figure,
                        "locust": [min(ours), max(ours)],
                        "theirs": [min(theirs), max(theirs)],
                        "agrees": touch,
                    }
                )
    return rows


def table(comparison: Sequence[dict[str, Any]]) -> str:
    """For people."""
    lines = ["| server | tester | figure | locust | theirs | agree |", "| --- | --- | --- | --- | --- | --- |"]
    for row in comparison:
        ours, theirs = (f"{low:.4g} to {high:.4g}" for low, high in (row["locust"], row["theirs"]))
        verdict = "yes" if row["agrees"] else "no"
        lines.append(f"| {row['server']} | {row['tester']} | {row['figure']} | {ours} | {theirs} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
