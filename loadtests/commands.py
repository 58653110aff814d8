"""What all commands of the load tests share: their parser, one line for what went wrong, and their exit codes."""

import argparse
import functools
import signal
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

from eos_vllm.cli.server_process import ServerError
from eos_vllm.core.errors import EosError
from loadtests.cell import LocustError
from loadtests.peers import PeerError

_P = ParamSpec("_P")


def command(name: str, resumable: bool = False) -> Callable[[Callable[_P, int]], Callable[_P, int]]:
    """Makes a ``main`` return 2 for a mistake of the user, 1 if a server or load tester failed, and say why in a line.

    Ctrl-C and SIGTERM return 130, once the servers that it started have ended.

    Args:
        name: the module's, within this package.
        resumable: the same command goes on with what was stopped.
    """

    def decorate(main: Callable[_P, int]) -> Callable[_P, int]:
        @functools.wraps(main)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
            before = signal.signal(signal.SIGTERM, _interrupt)
            try:
                return main(*args, **kwargs)
            except EosError as e:
                say(f"loadtests.{name}: error: {e}")
                return 2
            except (ServerError, LocustError, PeerError) as e:
                say(f"loadtests.{name}: {e}" + ("\nThe same command goes on from here." if resumable else ""))
                return 1
            except KeyboardInterrupt:
                say(f"loadtests.{name}: stopped" + ("; the same command goes on from here." if resumable else "."))
                return 130
            finally:
                signal.signal(signal.SIGTERM, before)

        return run

    return decorate


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m loadtests.<name>``, whose help is the module's text as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m loadtests.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_option(group: Any, name: str, default: Any, text: str) -> None:
    """Adds the flag of a setting, of its default's type; without a default it takes text."""
    kind = str if default is None else type(default)
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} (default: %(default)s)")


def say(text: str) -> None:
    """Tells people at once, and nobody who reads the results from the output."""
    print(text, file=sys.stderr, flush=True)
