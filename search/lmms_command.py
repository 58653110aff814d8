"""``eos-search lmms``: lmms-eval's benchmarks against one server per budget, as one raw result and its tables."""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_search.lmms import BENCHMARKS, HARNESS, TASKS, failed_requests, lmms_command, read_scores, record
from eos_search.lmms_server import check_server, kept_per_image, metrics, own_server, serve_flags
from eos_search.lmms_tables import budget_tables, cross_budget_table
from eos_vllm.core.budget import image_size, kept_counts, layer_average, parse_tokens
from eos_vllm.core.errors import EosError

STOCK = "none"
BUDGETS = "192,128,96,64,32,16"
_ALL = "all"
_HAS = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


@dataclass(frozen=True)
class Target:
    """One run of lmms-eval: a profile (or ``none``) at a budget (None for all tokens), on a server that holds both."""

    profile: str
    budget: int | None
    base_url: str | None


def add_parser(subparsers: Any) -> None:
    """Registers ``lmms``."""
    parser = subparsers.add_parser(
        "lmms",
        help="the twelve public benchmarks by lmms-eval against servers",
        description="Run lmms-eval once per budget. Its requests carry no budget, so each budget has its own server: "
        "name running ones with --servers (started with --eos-profile P --eos-retain N --eos-exact-counts), or let "
        "--serve start them.",
    )
    parser.add_argument("--servers", default=None, metavar="N=URL,...", help="a running server per budget; all=URL")
    parser.add_argument("--serve", default=None, metavar="MODEL", help="start a vllm serve of this model per budget")
    parser.add_argument("--serve-args", default="", metavar="TEXT", help="further flags of those servers, in one text")
    parser.add_argument("--profiles", default=STOCK, help="names or paths; with --servers one (default: %(default)s)")
    parser.add_argument("--budgets", default=BUDGETS, help="with --serve (default: %(default)s)")
    parser.add_argument("--served-model", default="eos", help="model name of the servers (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(BENCHMARKS), help="lmms-eval's names (default: the paper's twelve)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has lmms-eval (default: this one)")
    parser.add_argument(
        "--harness", default=HARNESS, metavar="MODULE", help="module that is run (default: %(default)s)"
    )
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="at most N questions of each task")
    parser.add_argument("--folder", type=Path, default=Path("runs/lmms"), help="lmms-eval writes samples here")
    parser.add_argument("--out", type=Path, default=None, help="raw result; what it holds is not run again")
    parser.add_argument("--against", default=None, help="profile whose difference to the others is shown")
    parser.add_argument("--table", type=Path, default=None, help="print the tables of this result, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs what is missing, and prints the tables."""
    if args.dry_run:
        for target in targets(args):
            print(" ".join(_command(args, target, target.base_url or "URL-OF-ITS-SERVER")))
        return 0
    result = read_raw(args.table) if args.table else measure(args)
    if result.get("limit"):
        print(f"At most {result['limit']} questions of each task.\n")
    print(budget_tables(result, args.against))
    tasks = [task for task in TASKS if any(task in case["scores"] for case in result["cases"])]
    print("\n" + "\n\n".join(cross_budget_table(result, task) for task in tasks))
    return 0


def targets(args: argparse.Namespace) -> list[Target]:
    """Which profile at which budget on which server.

    Raises:
        EosError: neither servers nor a model to serve, or both; an unknown task, a budget or profile that cannot be.
    """
    if unknown := [task for task in args.tasks.split(",") if task not in TASKS]:
        raise EosError("--tasks", unknown[0], "is none of the paper's", f"choose from {', '.join(BENCHMARKS)}")
    if bool(args.servers) == bool(args.serve):
        raise EosError("--servers", args.servers, "one of --servers and --serve is needed", "give 64=URL,16=URL,...")
    names = args.profiles.split(",")
    if args.serve:
        wanted = [parse_tokens(budget, "--budgets") for budget in args.budgets.split(",")]
        found = [Target(name, budget, None) for name in names for budget in ([None] if name == STOCK else wanted)]
    else:
        if len(names) > 1:
            raise EosError("--profiles", args.profiles, "--servers are of one profile", "name that one")
        found = []
        for pair in args.servers.split(","):
            text, _, url = pair.partition("=")
            budget = None if text == _ALL else parse_tokens(text, "--servers")
            if not url.startswith(("http://", "https://")) or (budget is not None and names[0] == STOCK):
                remedy = "give N=http://HOST:PORT/v1 and --profiles NAME, or all=URL for an unreduced one"
                raise EosError("--servers", pair, "this is no budget with its server and profile", remedy)
            found.append(Target(STOCK if budget is None else names[0], budget, url.rstrip("/")))
    for target in found:
        expected_counts(target)
    return found


def expected_counts(target: Target) -> list[int]:
    """Visual tokens that a target's profile keeps after each reducer; none for the unreduced model.

    Raises:
        EosError: a profile or a budget that cannot be, or a budget that reduces nothing.
    """
    from eos_vllm import profiles

    if target.budget is None:
        return []
    profile = profiles.resolve(target.profile)
    if target.budget >= image_size(profile):
        remedy = "run it with profile none, and all=URL"
        raise EosError("budget", target.budget, "an image has no more tokens than that: nothing is reduced", remedy)
    return list(kept_counts(profile, target.budget))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs lmms-eval for every target that the raw result lacks."""
    from eos_search.frozen import model_path
    from eos_search.raw import weights_digest
    from eos_vllm.provenance import provenance

    wanted = targets(args)
    require_lmms(args.python, args.harness)
    tasks = args.tasks.split(",")
    result: dict[str, Any] = {
        "provenance": provenance(),
        "tasks": tasks,
        "limit": args.limit,
        # Answers depend on these as well; servers that run already are as the caller says.
        "model": Path(args.serve).name if args.serve else args.served_model,
        "weights": weights_digest(model_path(args.serve)) if args.serve else None,
        "serve_args": args.serve_args,
        "harness": args.harness,
        "cases": [],
    }
    if args.out and args.out.exists():
        before = read_raw(args.out)
        for field in ("tasks", "limit", "model", "weights", "serve_args", "harness"):
            if before.get(field, result[field]) != result[field]:
                raise EosError("--out", str(args.out), f"holds results of another {field}", "name another file")
        result["cases"] = before["cases"]
    for target in wanted:
        same = [case for case in result["cases"] if (case["profile"], case["budget"]) == (_name(target), target.budget)]
        if any(case["variant"] == _digest(target) for case in same):
            continue
        with server_of(args, target) as base_url:
            made = run_one(args, target, base_url, tasks)
        result["cases"] = [case for case in result["cases"] if case not in same] + [made]
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            part = args.out.with_name(args.out.name + ".part")
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            part.replace(args.out)
    return result


def run_one(args: argparse.Namespace, target: Target, base_url: str, tasks: Sequence[str]) -> dict[str, Any]:
    """One run of lmms-eval against a server that has been looked at first, as a case of the raw result.

    Raises:
        EosError: the server is of another model or budget, or lmms-eval failed.
    """
    expected, folder = expected_counts(target), _folder(args, target)
    started_with = serve_flags(args.served_model, target.profile, target.budget)
    flags = " ".join(started_with[2:]) if expected else "no --eos-profile"
    if not check_server(base_url, args.served_model, expected, flags):
        print(f"{base_url} tells nothing of the tokens that it keeps; its budget is believed", file=sys.stderr)
    before, started = metrics(base_url), time.time()
    command = _command(args, target, base_url)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise EosError("lmms-eval", code, f"it failed for {_name(target)} at {target.budget}", "see its output above")
    return record(
        _name(target),
        target.budget,
        read_scores(folder, tasks, started),
        variant=_digest(target),
        expected=expected,
        layer_average=_layer_average(target, expected),
        kept_per_image=kept_per_image(before, metrics(base_url)),
        failed=failed_requests(folder),
        seconds=round(time.time() - started),
        samples=folder.name,
    )


def require_lmms(python: str, harness: str = HARNESS) -> None:
    """Whether an interpreter has lmms-eval, or what is run in its place.

    Raises:
        EosError: it hasn't, or cannot be run.
    """
    try:
        code = subprocess.run([python, "-c", _HAS, harness], check=False).returncode
    except OSError as error:
        raise EosError("--python", python, f"it cannot be run ({error.strerror})", "give an interpreter") from None
    if code:
        remedy = "install lmms-eval in an environment of its own, and name its interpreter with --python"
        raise EosError("--python", python, f"{harness.replace('_', '-')} is not installed there", remedy)


@contextmanager
def server_of(args: argparse.Namespace, target: Target) -> Iterator[str]:
    """Base URL of a target's server: the one that runs, or a ``vllm serve`` for the length of the block."""
    if target.base_url:
        yield target.base_url
        return
    flags = serve_flags(args.served_model, target.profile, target.budget, args.serve_args)
    folder = _folder(args, target)
    with own_server(args.serve, flags, folder.with_name(folder.name + ".log")) as base_url:
        yield base_url


def read_raw(file: Path) -> dict[str, Any]:
    """A raw result of this command.

    Raises:
        EosError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(result, dict) and all("scores" in case for case in result["cases"]):
            return result
        problem = "is no result of lmms-eval"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    raise EosError("result", str(file), problem, "name a file of eos-search lmms --out")


def _command(args: argparse.Namespace, target: Target, base_url: str) -> list[str]:
    tasks = args.tasks.split(",")
    folder = _folder(args, target)
    told = args.concurrency, args.limit, args.harness
    return lmms_command(args.python, base_url, args.served_model, tasks, folder, *told)


def _name(target: Target) -> str:
    from eos_vllm import profiles

    return STOCK if target.profile == STOCK else profiles.resolve(target.profile).name


def _digest(target: Target) -> str | None:
    from eos_search.raw import digest
    from eos_vllm import profiles

    return None if target.profile == STOCK else digest(profiles.resolve(target.profile))


def _layer_average(target: Target, counts: Sequence[int]) -> float | None:
    from eos_vllm import profiles

    return round(layer_average(profiles.resolve(target.profile), counts), 1) if counts else None


def _folder(args: argparse.Namespace, target: Target) -> Path:
    name = re.sub(r"[^\w.-]", "_", _name(target))
    return args.folder / f"{name}-{_ALL if target.budget is None else target.budget}"
