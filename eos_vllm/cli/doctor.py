"""`eos-vllm doctor`: tell whether this environment can serve, and mend what the project can mend."""

import argparse
import sys

from eos_vllm.setup.checks import Check, as_json, fix, run_checks


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `doctor` to the `eos-vllm` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this environment: versions, vLLM's platform and runner, the plugin",
        description="Check this environment. Exit code 0 if all is well, 1 otherwise.",
    )
    parser.add_argument("--fix", action="store_true", help="first mend what can be mended in site-packages")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {check, ok, detail, remedy}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if every check is OK, otherwise 1.

    A mend that fails (no right to write to site-packages) is said on standard error, and the checks still run.
    """
    if args.fix:
        # On standard error, so that --json prints nothing but JSON.
        try:
            for line in fix():
                print(f"fixed: {line}", file=sys.stderr)
        except OSError as error:
            print(f"could not fix: {error}", file=sys.stderr)
    checks = run_checks()
    print(as_json(checks) if args.json else report(checks))
    return 0 if all(check.ok for check in checks) else 1


def report(checks: list[Check]) -> str:
    """Return the report for people: one line for each check, and one that counts them."""
    width = max(len(check.check) for check in checks)
    lines = []
    for check in checks:
        remedy = f" -> {check.remedy}" if check.remedy and not check.ok else ""
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.check:<{width}}  {check.detail}{remedy}")
    failed = sum(not check.ok for check in checks)
    lines.append(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    return "\n".join(lines)
