"""`eos-search run`: the search, from a config and flags to ``theta.json``."""

import argparse
import os

from eos_search.settings import add_flags, given_flags, read_config, read_settings
from eos_search.starts import add_start_flags, starts_of


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `run` to the `eos-search` command."""
    parser = subparsers.add_parser(
        "run",
        help="search an operator profile on a frozen LLaVA and write theta.json",
        description="Search an operator profile on a frozen LLaVA. Settings come from --config, and flags go over it. "
        "Several GPUs: `accelerate launch -m eos_search.main run ...`.",
    )
    parser.add_argument("--config", metavar="NAME|FILE", help="a config of the package (embedded, ...) or a JSON file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the output folder")
    add_start_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search; print the reducers and where theta.json is."""
    settings = read_settings(read_config(args.config) if args.config else {}, given_flags(args))
    # The data loader's processes fork after the tokenizer was used, which its own threads don't survive.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need on a GPU
    from accelerate import PartialState

    from eos_search.export import reducer_lines
    from eos_search.restarts import run_restarts
    from eos_search.run import run_search

    starts = starts_of(args)
    if starts != [{}]:
        result = run_restarts(settings, starts, resume=args.resume, quiet=args.quiet, race=args.race)
    else:
        result = run_search(settings, resume=args.resume, quiet=args.quiet)
    if not PartialState().is_main_process:
        return 0
    for line in reducer_lines(result.profile):
        print(line)
    print(f"wrote {result.path}")
    return 0
