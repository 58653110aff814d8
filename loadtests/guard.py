"""Fails when eos at budget 64 is no longer as much faster than stock as the committed floor says: ``make bench-smoke``.

    python -m loadtests.guard                # about four minutes on 2 cores

One pair of servers, one interleaved run: stock, eos, eos, stock, and again. No part of ``make test``: it takes time.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eos_vllm.core.errors import SettingError
from loadtests.commands import command, parser_of
from loadtests.crosscheck import by_locust
from loadtests.grid import Kind, Load
from loadtests.questions import export_benchmark
from loadtests.settings import Workload, above_zero, at_least_one
from loadtests.subjects import serving, speed_subject
from loadtests.sweep_options import EAGER, PROMPT_CHARACTERS, SweepOptions

FLOOR = Path(__file__).with_name("floor.json")
_THERE_AND_BACK: tuple[Kind, ...] = ("stock", "eos", "eos", "stock")


@dataclass(frozen=True)
class Floor:
    """The least ratio of requests per second, eos at ``budget`` over stock, that is no regression."""

    preset: str
    budget: int
    ratio: float


def read_floor(path: Path) -> Floor:
    """Reads a floor.

    Raises:
        SettingError: it cannot be read, or is no floor.
    """
    remedy = 'give {"preset": …, "budget": …, "ratio": …}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        floor = Floor(str(values["preset"]), values["budget"], float(values["ratio"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SettingError("floor", path.name, f"it is no floor ({type(e).__name__}: {e})", remedy) from None
    at_least_one("floor.budget", floor.budget)
    above_zero("floor.ratio", floor.ratio, remedy)
    return floor


@dataclass(frozen=True)
class Decision:
    """What came out: whether it passes, and a line that says why."""

    passes: bool
    text: str


def decide(seconds: Sequence[dict[Kind, float]], floor: Floor, failed: int = 0) -> Decision:
    """Compares the median ratio over rounds with the floor.

    Args:
        seconds: for each round, seconds per request of stock and of eos.
        floor: what is asked for.
        failed: requests that were not answered; one is enough to fail.
    """
    if failed:
        return Decision(False, f"{failed} requests were not answered, so there is nothing to compare")
    ratios = [one["stock"] / one["eos"] for one in seconds]
    ratio = statistics.median(ratios)
    ranges = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    text = f"eos at budget {floor.budget} answers {ratio:.2f} times as many requests per second as stock ({ranges})"
    if ratio < floor.ratio:
        return Decision(False, f"{text}: below the floor of {floor.ratio:.2f}")
    return Decision(True, f"{text}; the floor is {floor.ratio:.2f}")


@command("guard")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the guard; 0 if it holds, 1 if not, 2 for a mistake of the user."""
    parser = parser_of("guard", __doc__)
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=8, help="per turn (default: %(default)s)")
    parser.add_argument("--floor", type=Path, default=FLOOR, help="JSON file of the floor (default: the committed one)")
    args = parser.parse_args(argv)
    for name in ("rounds", "concurrency", "requests"):
        at_least_one(name, getattr(args, name))
    floor = read_floor(args.floor)
    options = SweepOptions(
        Path(), preset=floor.preset, scenarios=("single",), loads=(Load(args.concurrency),), server_arguments=EAGER
    )
    seconds, failed = measure(options, floor, args.requests, args.rounds)
    decision = decide(seconds, floor, failed)
    print(f"loadtests.guard: {'passes' if decision.passes else 'FAILS'}: {decision.text}")
    return 0 if decision.passes else 1


def measure(options: SweepOptions, floor: Floor, requests: int, rounds: int) -> tuple[list[dict[Kind, float]], int]:
    """Seconds per request of stock and eos in each round, and the requests that were not answered.

    Raises:
        ServerError, LocustError: something ended badly.
    """
    load = options.loads[0]
    found: list[dict[Kind, float]] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="eos-guard-") as name:
        folder = Path(name)
        subject = speed_subject(options, folder)
        rows = export_benchmark(folder / "rows", requests)
        with serving(options, subject) as (pair, served):
            # Round 0 warms up.
            for number in range(rounds + 1):
                seconds: dict[Kind, float] = {"stock": 0.0, "eos": 0.0}
                for turn, kind in enumerate(_THERE_AND_BACK if number else _THERE_AND_BACK[:2]):
                    workload = Workload(
                        base_url=pair.url(kind),
                        model=served,
                        rows=str(rows),
                        concurrency=load.concurrency,
                        requests=requests,
                        budgets=() if kind == "stock" else (floor.budget,),
                        label=f"{number}/{turn}",
                        output_tokens=options.output_tokens,
                        prompt_characters=PROMPT_CHARACTERS,
                        seed=number,
                    )
                    figures = by_locust(workload, folder / f"{number}-{turn}")
                    seconds[kind] += 1 / figures.requests_per_second
                    failed += requests - figures.answered
                if number:
                    found.append(seconds)
    return found, failed


if __name__ == "__main__":
    sys.exit(main())
