"""Where a search may start: placements, selectors, withdrawals and query rules, which no gradient leads between."""

import argparse
import itertools
from typing import Any

from eos_vllm.core.errors import SettingError

# Settings that a start changes.
Start = dict[str, Any]
# Settings that may be given as lists, beside the placement, and how.
LISTS = {
    "select": "maxmin,uniform,none",
    "withdraw": "5,6,none",
    "queries": "all_text,last_text",
    "minimum": "1,8,16",
}


def add_start_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of :func:`starts_of`."""
    parser.add_argument(
        "--restarts", default=None, metavar="A,B;C,D;...", help="search from each placement, take the best end"
    )
    parser.add_argument(
        "--race", type=int, default=None, metavar="STEPS", help="behind so many, the best third of the starts goes on"
    )
    for name, example in LISTS.items():
        parser.add_argument(f"--restarts-{name}", default=None, metavar=example, help=f"the same with each {name}")


def parse_placements(text: str) -> list[tuple[int, ...]]:
    """Placements such as ``0,1,3;2,3,5``.

    Raises:
        SettingError: what is no list of layers, fewer than two of them, or one twice.
    """
    try:
        found = [tuple(int(layer) for layer in part.split(",")) for part in text.split(";")]
    except ValueError:
        found = []
    if len(found) < 2 or len(set(found)) < len(found):
        raise SettingError("restarts", text, "these are no placements", "give two or more, such as '0,1,3;2,3,5'")
    return found


def starts_of(args: argparse.Namespace) -> list[Start]:
    """All combinations of what the flags give, each as changed settings; a flag that is not given changes nothing.

    Raises:
        SettingError: one of them is no list of two or more, each once; or a race with one start.
    """
    choices: list[list[Start]] = []
    if args.restarts is not None:
        choices.append([{"placement": placement} for placement in parse_placements(args.restarts)])
    for name, example in LISTS.items():
        if (text := getattr(args, f"restarts_{name}")) is None:
            continue
        parts = [part.strip() for part in text.split(",")]
        if len(parts) < 2 or len(set(parts)) < len(parts):
            raise SettingError(f"restarts_{name}", text, "these are no choices", f"give two or more, such as {example}")
        choices.append([{name: part} for part in parts])
    if args.race is not None and not choices:
        raise SettingError("race", args.race, "there is one start", "give --restarts, or leave it out")
    return [{name: value for start in parts for name, value in start.items()} for parts in itertools.product(*choices)]


def folder_of(start: Start) -> str:
    """``start-placement-2-3-5-select-maxmin`` and the like."""
    parts = ["start"]
    for name, value in start.items():
        parts += [name, *(map(str, value) if name == "placement" else [str(value)])]
    return "-".join(parts)
