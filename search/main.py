"""The `eos-search` command. Each subcommand is a module with ``add_parser(subparsers)`` that sets ``run(args) -> int``.

Only the module of the subcommand that was asked for is imported, so that light ones answer at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from eos_vllm import __version__
from eos_vllm.core.errors import EosError

# Subcommand: its module and the line that --help shows.
COMMANDS = {
    "run": ("run_command", "search an operator profile on a frozen LLaVA and write theta.json"),
    "evaluate": ("evaluate_command", "accuracy of profiles at budgets, with intervals"),
    "ablate": ("ablate_command", "the paper's studies: alignment, placement, operator, budgets, robustness"),
    "plot": ("plot_command", "figures from raw results, runs and profiles, each with its data as JSON"),
    "lmms": ("lmms_command", "the twelve public benchmarks by lmms-eval against servers, a table per budget"),
}
_ERROR = 2
_INTERRUPTED = 130


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; ``command`` gets its own options, all other subcommands only their line of help."""
    parser = argparse.ArgumentParser(prog="eos-search", description="Search of visual token reduction operators.")
    parser.add_argument("--version", action="version", version=f"eos-search {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    loaded = COMMANDS[command][0] if command in COMMANDS else None
    if loaded is not None:
        importlib.import_module(f"eos_search.{loaded}").add_parser(subparsers)
    for name, (module, line) in COMMANDS.items():
        if module != loaded:
            subparsers.add_parser(name, help=line)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments without the program's name; those of the process where None.

    Returns:
        The subcommand's exit code; 2 after a mistake of the user, which is told in one line on stderr; 130 after an
        interrupt. argparse leaves by SystemExit on its own: 0 after --help and --version, 2 after unknown options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(arguments)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except EosError as error:
        print(f"eos-search: error: {error}", file=sys.stderr)
        return _ERROR
    except KeyboardInterrupt as interrupt:
        if reason := getattr(interrupt, "message", None):
            print(f"eos-search: {reason}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; the interpreter must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
