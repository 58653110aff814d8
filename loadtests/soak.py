"""Load held: saturation for half an hour, with streams that are left half way and requests that are broken on purpose.

    python -m loadtests.soak --minutes 30 --out results/soak-cpu.json

A KV cache that holds a few requests, more users than that, every scenario, four budgets at once. In the end nothing may
be left behind, and every request that was meant well must have its answer.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eos_vllm.cli.server_process import Server, ServerError
from eos_vllm.core.errors import EosError, SettingError
from loadtests.cell import CellRun, LocustError, run_cell
from loadtests.grid import Load
from loadtests.memory import MemoryWatch
from loadtests.origin import origin
from loadtests.questions import export_benchmark
from loadtests.records import Record
from loadtests.server_metrics import fetch
from loadtests.servers import MODEL_NAME, Servers
from loadtests.settings import Workload, at_least_one
from loadtests.soak_checks import checks
from loadtests.subjects import serving, speed_subject
from loadtests.sweep_options import EAGER, PROMPT_CHARACTERS, SweepOptions

SCENARIOS = {"single": 4.0, "several": 1.0, "multi_turn": 1.0, "two_images": 1.0, "text_only": 1.0}
# A cache of images that is full after minutes: one that fills for hours would look like a leak.
_ARGUMENTS = f"{EAGER} --mm-processor-cache-gb 0.05"
# glibc keeps freed tensors of varying sizes for itself (stock vLLM, too), and a leak would not show behind that. So
# large ones go back to the system at once, and what is resident is what is held.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "4"}
_IMAGES = 200
_DRAIN_SECONDS = 120
_LEAST_SAMPLES = 40
_GAUGES = ("running", "waiting", "kv_usage", "eos_blocks_held")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a soak; 0 if all checks hold, 1 if not or if something failed, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/soak-cpu.json"), help="default: %(default)s")
    parser.add_argument("--preset", default="bench-88m")
    parser.add_argument("--concurrency", type=int, default=24, help="users (default: %(default)s)")
    parser.add_argument("--aborted", type=float, default=0.10, help="share of streams left (default: %(default)s)")
    parser.add_argument("--malformed", type=float, default=0.05, help="share of broken requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.minutes <= 0:
            raise SettingError("minutes", args.minutes, "it must be above 0", "give 30")
        at_least_one("concurrency", args.concurrency)
        result = soak(args)
    except EosError as e:
        print(f"loadtests.soak: error: {e}", file=sys.stderr)
        return 2
    except (ServerError, LocustError) as e:
        print(f"loadtests.soak: {e}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for check in result["checks"]:
        print(f"{'ok  ' if check['holds'] else 'FAIL'}  {check['name']}: {check['seen']}")
    return 0 if all(check["holds"] for check in result["checks"]) else 1


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the server, soaks it, lets it drain, and judges.

    Raises:
        EosError: settings that cannot go together.
        ServerError, LocustError: something ended badly.
    """
    options = SweepOptions(
        args.out,
        preset=args.preset,
        budgets=(576, 192, 64, 16),
        # A KV cache with room for one request of full length, which is three stock requests as they come here.
        loads=(Load(1),),
        max_model_len=2048,
        server_arguments=_ARGUMENTS,
        # Only one of the two servers is wanted, and started when it is asked for.
        serial=True,
    )
    with tempfile.TemporaryDirectory(prefix="eos-soak-") as name:
        folder = Path(name)
        subject = speed_subject(options, folder)
        rows = export_benchmark(folder / "rows", _IMAGES)
        with serving(options, subject, _ALLOCATOR) as (pair, _):
            assert isinstance(pair, Servers)
            workload = Workload(
                base_url=pair.url("eos"),
                model=MODEL_NAME,
                rows=str(rows),
                concurrency=args.concurrency,
                seconds=args.minutes * 60,
                budgets=options.budgets,
                scenarios=SCENARIOS,
                repeat_share=0.1,
                label=f"soak {time.time():.0f}",
                prompt_characters=PROMPT_CHARACTERS,
                abort_share=args.aborted,
                malformed_share=args.malformed,
                seed=args.seed,
            )
            server = pair.running["eos"]
            with MemoryWatch(server.process.pid, period=min(5.0, args.minutes * 60 / _LEAST_SAMPLES)) as memory:
                run = run_cell(workload, folder / "run", period=5.0)
            drained = drain(server)
            last = run_cell(_one_more(workload), folder / "last")
            alive = server.process.poll() is None
    answered = all(record.good for record in last.records)
    found = checks(run.records, alive, drained, [size for _, size in memory.samples], answered)
    return {
        "provenance": origin(seed=args.seed),
        "settings": _without_machine(workload)
        | {"server_arguments": options.server_arguments, "server_environment": _ALLOCATOR},
        "subject": subject.to_dict(),
        "seconds": round(run.seconds, 1),
        "requests": counted(run.records),
        "requests_per_second": round(sum(r.good for r in run.records) / run.seconds, 3),
        "checks": [check.to_dict() for check in found],
        "drained": drained,
        "resident_bytes": memory.samples,
        "metrics": run.metrics,
        "client": run.client,
        "failures": _failures(run),
    }


def _one_more(workload: Workload) -> Workload:
    values = workload.to_dict() | {"seconds": None, "requests": 1, "concurrency": 1, "scenarios": {"single": 1.0}}
    return Workload.from_dict(values | {"abort_share": 0.0, "malformed_share": 0.0, "label": "last"})


def drain(server: Server) -> dict[str, float]:
    """The server's gauges once they are all at 0, or after two minutes."""
    deadline, values = time.monotonic() + _DRAIN_SECONDS, {}
    while time.monotonic() < deadline:
        try:
            values = {name: value for name, value in fetch(server.url).values.items() if name in _GAUGES}
        except (OSError, ValueError):
            return {}
        if not any(values.values()):
            break
        time.sleep(1)
    return values


def counted(records: Sequence[Record]) -> dict[str, Any]:
    """Requests by what they were and what came of them."""
    kinds = Counter("broken" if r.fault else "left half way" if r.aborted else r.scenario for r in records)
    return {
        "all": len(records),
        "by kind": dict(kinds),
        "by fault": dict(Counter(r.fault for r in records if r.fault)),
        "by budget": {str(k): v for k, v in Counter(r.budget for r in records if r.fault is None).items()},
        "failed": dict(Counter(r.cause for r in records if r.cause is not None)),
    }


def _failures(run: CellRun, most: int = 50) -> list[dict[str, Any]]:
    return [record.to_dict() for record in run.records if record.cause is not None][:most]


def _without_machine(workload: Workload) -> dict[str, Any]:
    values = workload.to_dict()
    return {key: value for key, value in values.items() if key not in ("base_url", "rows", "label")}


if __name__ == "__main__":
    sys.exit(main())
