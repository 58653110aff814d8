"""Load held: saturation for half an hour, with streams that are left half way and requests that are broken on purpose.

    python -m loadtests.soak --minutes 30 --out results/soak-cpu.json
    python -m loadtests.soak --requests 10000 --replicas 2 --aborted 0.3 --out results/soak-two-replicas.json

With several replicas the embedded model is served, behind vLLM's router, and fewer of the same requests go to as many
stock servers afterwards, for their memory. ``python -m loadtests.soak_chart FILE PNG`` draws both.

A KV cache that holds a few requests, more users than that, every scenario, four budgets at once. In the end nothing may
be left behind, and every request that was meant well must have its answer.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.models import embedded
from loadtests.cell import CellRun
from loadtests.commands import command, parser_of
from loadtests.grid import Kind, Load
from loadtests.memory import growth
from loadtests.origin import origin
from loadtests.questions import export_benchmark
from loadtests.replicas import Cluster, replicated
from loadtests.servers import MODEL_NAME, Servers
from loadtests.settings import Workload, above_zero, at_least_one
from loadtests.soak_checks import checks
from loadtests.soak_run import counted, soaked_by
from loadtests.subjects import Subject, server_spec, serving, speed_subject
from loadtests.sweep_options import EAGER, PROMPT_CHARACTERS, SweepOptions

SCENARIOS = {"single": 4.0, "several": 1.0, "multi_turn": 1.0, "two_images": 1.0, "text_only": 1.0}
# A cache of images that is full after minutes: one that fills for hours would look like a leak.
_ARGUMENTS = f"{EAGER} --mm-processor-cache-gb 0.05"
# Both are vLLM's defaults. A step holds one prompt of two images, and with two prompts the second is cut into chunks.
_REPLICATED = f"{_ARGUMENTS} --enable-prefix-caching --enable-chunked-prefill --max-num-batched-tokens 1536"
# The embedded model's answers are a word: who wants to leave half way must do so at once, or behind it.
_ABORT_PIECES = 1
# Room for that many requests of full length in each replica's KV cache.
_REPLICA_REQUESTS = 4
# glibc keeps freed tensors of varying sizes for itself (stock vLLM, too), and a leak would not show behind that. So
# large ones go back to the system at once, and what is resident is what is held.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "4"}
_IMAGES = 200


@command("soak")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a soak; 0 if all checks hold, 1 if not or if something failed, 2 for a mistake of the user."""
    parser = parser_of("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=None, help="end after so many instead")
    parser.add_argument("--replicas", type=int, default=1, help="behind vLLM's router (default: %(default)s)")
    parser.add_argument("--stock-requests", type=int, default=None, help="default: a quarter of --requests")
    parser.add_argument("--out", type=Path, default=Path("results/soak-cpu.json"), help="default: %(default)s")
    parser.add_argument("--preset", default="bench-88m")
    parser.add_argument("--concurrency", type=int, default=24, help="users (default: %(default)s)")
    parser.add_argument("--aborted", type=float, default=0.10, help="share of streams left (default: %(default)s)")
    parser.add_argument("--malformed", type=float, default=0.05, help="share of broken requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    above_zero("minutes", args.minutes, "give 30")
    at_least_one("concurrency", args.concurrency)
    at_least_one("replicas", args.replicas)
    for name in ("requests", "stock_requests"):
        if getattr(args, name) is not None:
            at_least_one(name, getattr(args, name))
    if args.replicas > 1 and args.requests is None:
        raise SettingError("requests", None, "several replicas are soaked by number", "give 10000")
    result = soak(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for check in result["checks"]:
        print(f"{'ok  ' if check['holds'] else 'FAIL'}  {check['name']}: {check['seen']}")
    return 0 if all(check["holds"] for check in result["checks"]) else 1


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the servers, soaks them, lets them drain, and judges.

    Raises:
        EosError: settings that cannot go together.
        ServerError, LocustError: something ended badly.
    """
    options = _options(args)
    with tempfile.TemporaryDirectory(prefix="eos-soak-") as name:
        folder = Path(name)
        subject = speed_subject(options, folder)
        if args.replicas > 1:
            subject = replace(subject, name="embedded")
        rows = export_benchmark(folder / "rows", _IMAGES)
        workload = _workload(args, options, rows)
        with _cluster(args, options, subject, "eos", folder) as cluster:
            soaked = soaked_by(cluster, replace(workload, base_url=cluster.url), folder / "eos")
        stock = None
        if args.replicas > 1:
            count = args.stock_requests or max(1, args.requests // 4)
            # A stock server knows no budgets, and takes whatever stands there.
            with _cluster(args, options, subject, "stock", folder) as cluster:
                fewer = replace(workload, base_url=cluster.url, requests=count, budgets=())
                stock = soaked_by(cluster, fewer, folder / "stock")
    run = soaked.run
    # Of several servers the one that grew most.
    sizes = max(soaked.sizes, key=lambda found: growth(found) or 0.0)
    found = checks(run.records, soaked.alive, soaked.drained, sizes, soaked.answered)
    return {
        "provenance": origin(seed=args.seed),
        "settings": _without_machine(workload)
        | {"server_arguments": options.server_arguments, "server_environment": _ALLOCATOR, "replicas": args.replicas},
        "subject": subject.to_dict(),
        "seconds": round(run.seconds, 1),
        "requests": counted(run.records),
        "requests_per_second": round(sum(r.good for r in run.records) / run.seconds, 3),
        "checks": [check.to_dict() for check in found],
        "drained": soaked.drained,
        "resident_bytes": soaked.memory[0] if args.replicas == 1 else soaked.memory,
        "metrics": run.metrics,
        "client": run.client,
        "failures": _failures(run),
    } | ({} if stock is None else {"stock": stock.to_dict()})


def _options(args: argparse.Namespace) -> SweepOptions:
    several = args.replicas > 1
    return SweepOptions(
        args.out,
        preset=args.preset,
        model=str(embedded.path()) if several else None,
        profile="embedded-searched" if several else SweepOptions.profile,
        budgets=(576, 192, 64, 16),
        # A KV cache with room for one request of full length, which is three stock requests as they come here.
        loads=(Load(_REPLICA_REQUESTS if several else 1),),
        max_model_len=2048,
        server_arguments=_REPLICATED if several else _ARGUMENTS,
        # Only one of the two servers is wanted, and started when it is asked for.
        serial=True,
    )


def _workload(args: argparse.Namespace, options: SweepOptions, rows: Path) -> Workload:
    return Workload(
        base_url="http://127.0.0.1",
        model=MODEL_NAME,
        rows=str(rows),
        concurrency=args.concurrency,
        requests=args.requests,
        seconds=args.minutes * 60 if args.requests is None else None,
        budgets=options.budgets,
        scenarios=SCENARIOS,
        repeat_share=0.1,
        label=f"soak {time.time():.0f}",
        prompt_characters=PROMPT_CHARACTERS,
        abort_share=args.aborted,
        abort_pieces=_ABORT_PIECES if args.replicas > 1 else None,
        malformed_share=args.malformed,
        seed=args.seed,
    )


@contextmanager
def _cluster(
    args: argparse.Namespace, options: SweepOptions, subject: Subject, kind: Kind, folder: Path
) -> Iterator[Cluster]:
    """One server by itself, or several behind the router."""
    if args.replicas == 1:
        with serving(options, subject, _ALLOCATOR) as (pair, _):
            assert isinstance(pair, Servers)
            yield Cluster(pair.url(kind), (pair.running[kind],))
        return
    assert subject.profile is not None
    profile = folder / "theta.json"
    profile.write_text(json.dumps(subject.profile.to_dict()))
    with replicated(server_spec(options, subject, _ALLOCATOR), kind, args.replicas, folder, profile) as cluster:
        yield cluster


def _failures(run: CellRun, most: int = 50) -> list[dict[str, Any]]:
    return [record.to_dict() for record in run.records if record.cause is not None][:most]


def _without_machine(workload: Workload) -> dict[str, Any]:
    values = workload.to_dict()
    return {key: value for key, value in values.items() if key not in ("base_url", "rows", "label")}


if __name__ == "__main__":
    sys.exit(main())
