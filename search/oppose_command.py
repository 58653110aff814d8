"""``eos-search oppose``: other searches of the same cost, with as much compute as a gradient search."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eos_search.opponents.base import METHODS
from eos_search.opponents.judge import Budget
from eos_search.opponents.settings import DEFAULT_SELECTORS, MINIMUMS, QUERIES, OpponentSettings
from eos_search.selectors import NAMED
from eos_vllm.cluttervqa import VERSIONS
from eos_vllm.core.budget import parse_tokens


def add_parser(subparsers: Any) -> None:
    """Registers ``oppose``."""
    parser = subparsers.add_parser(
        "oppose",
        help="other searches of the same cost and compute: random, TPE, one knob at a time",
        description="Search a profile of a given cost without gradients, judged on ClutterVQA's validation split.",
    )
    parser.add_argument("--method", required=True, choices=METHODS, help="who searches")
    parser.add_argument("--cost", required=True, help="layer averages in tokens, comma-separated; the first is its own")
    parser.add_argument("--out", type=Path, required=True, help="folder for theta.json and the log of all trials")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="CPU-seconds to spend")
    budget.add_argument(
        "--like", type=Path, metavar="RUN", help="as many CPU-seconds as the search in this folder took"
    )
    budget.add_argument("--questions", type=int, help="questions to ask, each counted for every cost")
    parser.add_argument("--model", default="embedded", help="model directory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--name", default=None, help="of the exported profile (default: the method's)")
    parser.add_argument("--images", type=int, default=72, help="validation images (default: %(default)s)")
    parser.add_argument(
        "--first-images", type=int, default=8, help="those that all are judged on (default: %(default)s)"
    )
    parser.add_argument("--max-reducers", type=int, default=3, help="of random and tpe (default: %(default)s)")
    parser.add_argument(
        "--selectors",
        default=",".join(DEFAULT_SELECTORS),
        help=f"of random and tpe, before the decoder: of {', '.join(NAMED)}, or none (default: %(default)s)",
    )
    parser.add_argument("--queries", default=",".join(QUERIES), help="query rules (default: %(default)s)")
    parser.add_argument(
        "--minimums", default=",".join(map(str, MINIMUMS)), help="least counts to choose from (default: %(default)s)"
    )
    parser.add_argument(
        "--benchmark-version", type=int, choices=tuple(VERSIONS), default=1, help="of ClutterVQA (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=8, help="longest answer (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")
    parser.add_argument("--resume", action="store_true", help="go on from the log in the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search; print the reducers, the score and where theta.json is."""
    settings = read(args)
    from eos_search.export import reducer_lines
    from eos_search.opponents.contest import run_opponent

    with tqdm(unit="question", disable=args.quiet or None) as bar:

        def told(trial: str) -> Any:
            bar.set_description(trial)
            return bar.update

        result = run_opponent(settings, args.out, args.resume, args.processes, told)
    for line in reducer_lines(result.profile):
        print(line)
    shares = ", ".join(f"{share} at {cost}" for cost, share in result.accuracy.items())
    ended = "budget spent" if result.spent else "nothing left to try"
    print(f"{result.trials} trials, {ended}; trial {result.best.trial} is best: {shares}")
    print(f"wrote {result.path}")
    return 0


def read(args: argparse.Namespace) -> OpponentSettings:
    """Settings of the arguments.

    Raises:
        EosError: a value that cannot be; or no CPU-seconds in the folder of ``--like``.
    """
    from eos_search.spent import seconds_of
    from eos_vllm.core.errors import SettingError

    if args.processes is not None and args.processes < 1:
        raise SettingError("processes", args.processes, "is below 1", "give 1 or more")
    seconds = args.seconds if args.like is None else seconds_of(args.like)
    return OpponentSettings(
        method=args.method,
        costs=tuple(parse_tokens(cost, "--cost") for cost in args.cost.split(",")),
        budget=Budget(seconds, args.questions),
        model=args.model,
        seed=args.seed,
        name=args.name or args.method,
        images=args.images,
        first_images=args.first_images,
        max_reducers=args.max_reducers,
        selectors=() if args.selectors == "none" else _names(args.selectors),
        queries=_names(args.queries),
        minimums=tuple(parse_tokens(part, "--minimums") for part in args.minimums.split(",")),
        benchmark_version=args.benchmark_version,
        max_tokens=args.max_tokens,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
