"""``eos-search discriminates``: whether ClutterVQA tells the right tokens from the wrong ones on a model."""

import argparse
import json
from pathlib import Path
from typing import Any

from eos_search.answerers import Case
from eos_search.discrimination import BUDGET, WITHOUT, selecting_profile, verdict, with_both_means, yardsticks
from eos_search.evaluate_command import check, measure
from eos_search.evaluation import cases, table
from eos_search.raw import read_result
from eos_search.selectors import NAMED
from eos_vllm.cluttervqa import SPLITS, VERSIONS
from eos_vllm.core.errors import EosError


def add_parser(subparsers: Any) -> None:
    """Registers ``discriminates``."""
    parser = subparsers.add_parser(
        "discriminates",
        help="whether ClutterVQA tells the right tokens from the wrong ones on a model",
        description="All tokens, every n-th patch, and the patches that each question needs, at one budget before the "
        "decoder. Exit code 1 where every n-th patch costs too little, or the right ones too much.",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--profiles", default="", help="comma-separated names or paths, for the table only")
    parser.add_argument("--selectors", default="", help="more that choose, for the table only: " + ", ".join(NAMED))
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--benchmark-version", type=int, choices=tuple(VERSIONS), default=2, help="of ClutterVQA (default: %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="of ClutterVQA (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of it (default: %(default)s)")
    parser.add_argument("--per-kind", type=int, default=None, help="at most so many questions of each kind")
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")
    parser.add_argument("--out", type=Path, default=None, help="raw result; a stopped evaluation goes on from it")
    parser.add_argument("--table", type=Path, default=None, help="judge this result, and ask nothing")
    parser.set_defaults(
        run=run,
        rows=None,
        base_url=None,
        page=None,
        figure=None,
        against=None,
        max_tokens=8,
        scorer=None,
        first_image=0,
    )


def run(args: argparse.Namespace) -> int:
    """Asks, prints the tables and the verdict; 1 where it does not discriminate."""
    check(args)
    if args.table:
        result = read_result(args.table)
    else:
        size = sizes(args.model)
        wanted = yardsticks(*size, args.budget)
        for name in filter(None, args.selectors.split(",")):
            wanted.append(Case(name, selecting_profile(*size, args.budget, name), args.budget))
        if args.profiles:
            wanted += cases([name.strip() for name in args.profiles.split(",")], [args.budget])
        result = measure(args, wanted)
    shown = with_both_means(result)
    kinds = list(shown["cases"][0]["accuracy"])
    print("\n\n".join(table(shown, kind) for kind in [kinds[-1], *kinds[:-1]]))
    found = verdict(result)
    print(f"\nat {args.budget} tokens, {WITHOUT}:\n{found}")
    return 0 if found.discriminates else 1


def sizes(model: str) -> tuple[int, int]:
    """Decoder layers and visual tokens of an image of a LLaVA, from its ``config.json``.

    Raises:
        EosError: it is not there, or is none of a LLaVA with a CLIP tower.
    """
    file = Path(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        vision = config["vision_config"]
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        return config["text_config"]["num_hidden_layers"], tokens
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is no LLaVA's ({type(error).__name__}: {error})"
        raise EosError("--model", str(file), problem, "name the directory of one with a CLIP tower") from error
