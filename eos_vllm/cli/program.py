"""A command with subcommands: each is a module with ``add_parser(subparsers)`` that sets a ``run(args) -> int``.

Only the module of the subcommand that was asked for is imported, so that light ones answer at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eos_vllm import __version__
from eos_vllm.core.errors import EosError

_ERROR = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Program:
    """``eos-vllm`` or ``eos-search``.

    Attributes:
        name: as users type it.
        description: what ``--help`` says of it.
        package: where the modules of the subcommands are.
        commands: subcommand: its module and the line that ``--help`` shows.
    """

    name: str
    description: str
    package: str
    commands: Mapping[str, tuple[str, str]]

    def build_parser(self, command: str | None = None) -> argparse.ArgumentParser:
        """The parser; ``command`` gets its own options, all other subcommands only their line of help."""
        parser = argparse.ArgumentParser(prog=self.name, description=self.description)
        parser.add_argument("--version", action="version", version=f"{self.name} {__version__}")
        subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        loaded = self.commands.get(command or "", (None,))[0]
        if loaded is not None:
            importlib.import_module(f"{self.package}.{loaded}").add_parser(subparsers)
        for name, (module, line) in self.commands.items():
            if module != loaded:
                subparsers.add_parser(name, help=line)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs one subcommand.

        Args:
            argv: arguments without the program's name; those of the process where None.

        Returns:
            The subcommand's exit code; 2 after a mistake of the user, which is told in one line on stderr; 130 after an
            interrupt, whose ``message`` is told if it has one. argparse leaves by SystemExit on its own: 0 after --help
            and --version, 2 after unknown options.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        command = next((argument for argument in arguments if not argument.startswith("-")), None)
        try:
            args = self.build_parser(command).parse_args(arguments)
            code = int(args.run(args))
            sys.stdout.flush()
            return code
        except EosError as error:
            print(f"{self.name}: error: {error}", file=sys.stderr)
            return _ERROR
        except KeyboardInterrupt as interrupt:
            if message := getattr(interrupt, "message", None):
                print(f"{self.name}: {message}", file=sys.stderr)
            return _INTERRUPTED
        except BrokenPipeError:
            # The reader (head, less) has gone; the interpreter must not try to flush again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
