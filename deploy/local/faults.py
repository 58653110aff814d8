"""Faults with 200 requests in flight, on two replicas behind the real router: what clients get, how long it takes.

``make faults``, or ``PYTHONPATH=. python deploy/local/faults.py [NAME ...]`` (names: ``FAULTS``). Faults that need the
same flags come one after the other on one stack, each when the one before is over and the replica has recovered. Exit
code 1 where an answer was wrong, ended as if it were whole and was not, or never came, or where a replica did not
recover. Raw results: ``--out``; all that it prints goes into ``--log`` as well; ``--page`` puts the table in. Where
faults are named, the results and log of others stay as they are.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fault_stack
import fault_table
import stack
from fault_client import LOST_SILENTLY, Case, cases, known_right
from fault_kinds import FAULTS
from fault_scene import Scene, prepared

from eos_vllm.provenance import provenance

ROOT = stack.HERE.parents[1]
START = time.monotonic()
# Of a result: requests under way at the fault and until it is over, new ones until recovery, some after it.
PARTS = ("in_flight", "during", "after")


class Log:
    """Prints lines with the seconds since the start, and writes them to a file."""

    def __init__(self, file: Path, keep: bool = False) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("a" if keep else "w", encoding="utf-8")

    def __call__(self, text: str) -> None:
        line = f"{time.monotonic() - START:6.0f} s  {text}".replace(str(ROOT), ".").replace(str(stack.FOLDER), "logs")
        print(line, flush=True)
        print(line, file=self._out, flush=True)


def problems(result: dict[str, Any]) -> list[str]:
    """What may not be in a fault's result."""
    found = []
    for part in PARTS:
        for kind in LOST_SILENTLY:
            if count := result[part]["outcomes"].get(kind):
                found.append(f"{count} {kind} ({part.replace('_', ' ')})")
    if any(kind != "right" for kind in result["after"]["outcomes"]) or not result["after"]["outcomes"]:
        found.append(f"after recovery: {result['after']['outcomes']}")
    if result["recover_seconds"] is None:
        found.append("no recovery")
    return found + result.get("problems", [])


def stacks(names: Sequence[str], in_flight: int) -> dict[str, list[str]]:
    """Which faults share a stack: those with the same flags, by these."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(FAULTS[name].flags(in_flight), []).append(name)
    return found


def run(
    flags: str, names: list[str], args: argparse.Namespace, known: list[Case], say: Log
) -> Iterator[dict[str, Any]]:
    """Faults on one stack; yields each one's result.

    Args:
        flags: of the replicas, beyond those of ``make up``.
        names: the faults.
        args: of the command line.
        known: the questions that are known to be answered right; where it is empty, they are found out and put in.
        say: the log.
    """
    own = {FAULTS[name].own for name in names}
    with prepared(stack.FOLDER, own) as (profile, logs), fault_stack.running(flags, profile, logs) as running:
        say(f"two replicas and the router answer; flags beyond make up's: {flags or 'none'}")
        if not known:
            wanted = cases(args.seed, args.cases)
            known += asyncio.run(known_right(stack.REPLICAS[0], wanted))
            say(f"{len(known)} of {len(wanted)} questions are answered right by an idle replica; these are asked")
        for name in names:
            fault = FAULTS[name]
            say(f"fault {name}: {fault.what}")
            scene = Scene(running, known, args.in_flight, say, random.Random(args.seed), profile)
            result = {"name": name, "what": fault.what, "flags": flags} | asyncio.run(scene.play(fault))
            result["problems"] = problems(result)
            # Starts, and so recovery, take as long as other work on the machine lets them.
            result["load_average"] = round(os.getloadavg()[0], 1)
            for part in PARTS:
                say(f"{part.replace('_', ' ')}: {result[part]['outcomes']}")
                for kind, details in result[part]["details"].items():
                    say(f"  {kind}, for instance: {details[0]}")
            say(f"notes: {result['notes']}")
            say(
                f"recovered after {result['recover_seconds']} s; "
                f"{'FAILED: ' if result['problems'] else 'as it should be'}" + "; ".join(result["problems"])
            )
            yield result


def merged(earlier: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of an earlier run, those replaced that were played again; in the order of ``FAULTS``."""
    by_name = {result["name"]: result for result in (*earlier, *now)}
    return [by_name[name] for name in FAULTS if name in by_name]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the faults named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)} (default: all)")
    parser.add_argument("--in-flight", type=int, default=200, help="requests at the fault (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=60, help="questions tried for it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "faults.json")
    parser.add_argument("--log", type=Path, default=ROOT / "results" / "faults.txt")
    parser.add_argument("--page", type=Path, help="page whose table of faults is replaced, docs/operations.md say")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FAULTS]:
        parser.error(f"no such fault: {unknown[0]}; choose from {', '.join(FAULTS)}")
    say = Log(args.log, keep=bool(args.names))
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["faults"] if args.names and args.out.exists() else []
    results: list[dict[str, Any]] = []
    known: list[Case] = []
    facts = provenance(seed=args.seed)
    say(f"{facts['command']} at {facts['git']}, load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")
    try:
        for flags, names in stacks(args.names or list(FAULTS), args.in_flight).items():
            for result in run(flags, names, args, known, say):
                results.append(result | {"provenance": facts})
                # Now, for the next one may fail to start.
                found = {"faults": merged(earlier, results)}
                args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except stack.StackError as e:
        say(f"FAILED: {e}")
        return 1
    if args.page:
        fault_table.put(args.page, merged(earlier, results))
    return int(any(result["problems"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
