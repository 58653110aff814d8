"""``eos-search compare``: searched profiles against opponents of the same compute, at equal cost, on the test split."""

import argparse
import sys
from pathlib import Path
from typing import Any

from eos_search.answerers import STOCK, Case
from eos_search.evaluate_command import check, measure
from eos_search.opponents.base import METHODS
from eos_search.raw import read_result, write_raw
from eos_search.settings import read_config
from eos_search.starts import add_start_flags, starts_of
from eos_vllm.core.budget import parse_tokens
from eos_vllm.core.errors import EosError

COSTS = "320,250,190,128,64,32"


def add_parser(subparsers: Any) -> None:
    """Registers ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="gradient searches against opponents of the same compute, at equal cost",
        description="Search by gradients, let each opponent search as many CPU-seconds, and ask all profiles the test "
        "split's questions at the same layer averages. What was stopped goes on with the same command.",
    )
    parser.add_argument("--config", default="embedded-cost", help="of the gradient search (default: %(default)s)")
    parser.add_argument("--model", default=None, help="model directory (default: the config's)")
    add_start_flags(parser)
    parser.add_argument("--opponents", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--costs", default=COSTS, help="layer averages in tokens (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of every search (default: %(default)s)")
    parser.add_argument("--judge-images", type=int, default=72, help="validation images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=600, help="test images (default: %(default)s)")
    parser.add_argument("--first-image", type=int, default=0, help="number of the first of them (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder of the searches")
    parser.add_argument("--out", type=Path, default=None, help="raw result")
    parser.add_argument("--table", type=Path, default=None, help="print the tables of this result, and search nothing")
    parser.add_argument(
        "--rules", type=Path, default=None, metavar="FILE", help="an evaluation whose profiles are opponents as well"
    )
    parser.add_argument("--figure", type=Path, default=None, help="draw it to this PNG")
    parser.set_defaults(
        run=run, rows=None, base_url=None, page=None, against=None, per_kind=None, scorer=None, split="test",
        served_model="embedded", max_tokens=8,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Searches, asks, and prints the tables."""
    from eos_search.comparison.summary import tables, with_rules

    result = read_result(args.table) if args.table else compare(args)
    if "runs" not in result:
        raise EosError("--table", str(args.table), "is no comparison", "name a result of eos-search compare --out")
    if args.rules:
        result = with_rules(result, read_result(args.rules))
    print(tables(result))
    if args.figure:
        from matplotlib import rc_context

        from eos_search.plots.canvas import STYLE, save
        from eos_search.plots.comparison import comparison_figure

        with rc_context(STYLE):
            figure, data = comparison_figure(result)
            save(figure, args.figure, data)
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise EosError("--seeds", text, "these are no seeds", "give whole numbers, such as 0,1,2")
    return tuple(map(int, parts))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result: an evaluation, with ``runs`` that say which search found which profile."""
    from eos_search.comparison.searches import Plan, run_searches

    opponents = [name for name in args.opponents.split(",") if name and name != "none"]
    if unknown := [name for name in opponents if name not in METHODS]:
        raise EosError("--opponents", unknown[0], "is no opponent", f"choose from {', '.join(METHODS)}")
    config = read_config(args.config) | ({"model": args.model} if args.model else {})
    plan = Plan(
        config=config,
        starts=starts_of(args),
        opponents=opponents,  # type: ignore[arg-type]
        costs=tuple(parse_tokens(cost, "--costs") for cost in args.costs.split(",")),
        seeds=_seeds(args.seeds),
        out=args.runs,
        images=args.judge_images,
        race=args.race,
    )
    first = plan.gradient(plan.seeds[0])
    args.model = None if first.model == "embedded" else first.model
    args.benchmark_version = first.benchmark_version
    check(args)
    found = list(run_searches(plan, args.processes, lambda line: print(line, file=sys.stderr, flush=True)))
    wanted = [Case(STOCK, None, None)]
    wanted += [Case(one.profile.name, one.profile, cost) for one in found for cost in one.costs]
    result = measure(args, wanted) | {"runs": [one.about() for one in found]}
    if args.out:
        write_raw(args.out, result)
    return result
