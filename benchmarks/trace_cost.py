"""What traces cost: 24 requests at once, in an engine without the page, with it, and with every request traced.

    python benchmarks/trace_cost.py --out results/trace-cost.json      # ten minutes
    python benchmarks/trace_cost.py --table results/trace-cost.json

Two engines in one process answer the same requests in turn, each time with empty prefix caches. The model is small, so
that what is added weighs more than it would on a real one. Beside wall time stands the process' CPU time, which other
processes of the machine disturb less.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import PRESETS, write_tiny_model
from eos_vllm.provenance import provenance

PROFILE = "sparsevlm-v2-llava-1.5-7b"
REQUESTS, TOKENS = 24, 16
# Name, whether its engine has the page, whether its requests are traced.
CASES = (("no page", False, False), ("page, not traced", True, False), ("page, all traced", True, True))
BASE, SAME, TRACED = (name for name, _, _ in CASES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="embedded", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=420, help="of all cases, in random order (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="begin no round after these (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print the table of this result, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = {"preset": args.preset, "profile": PROFILE, "requests": REQUESTS, "tokens": TOKENS}
    with tempfile.TemporaryDirectory(prefix="eos-trace-") as folder:
        model = write_tiny_model(Path(folder) / "model", shape=PRESETS[args.preset])
        measured = measure(model, args.rounds, args.seconds)
    result = {"provenance": provenance(seed=0), "settings": settings, **measured}
    result["over_no_page"] = ratios(result, BASE)
    # One engine: what its place in memory is worth against the other one's is no part of this.
    result["over_not_traced"] = {TRACED: ratios(result, SAME)[TRACED]}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def measure(model: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of each round by case, wall and CPU; seconds to read the traces of a round."""
    from vllm import LLM

    shape = geometry(model)
    profile = scale_to_model(profiles.load(PROFILE), shape.num_decoder_layers, shape.visual_tokens)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": REQUESTS,
        "kv_cache_memory_bytes": 256 << 20,
        "limit_mm_per_prompt": {"image": 1},
    }
    engines = {
        page: LLM(str(model), **settings, additional_config={"eos": {"profile": profile.to_dict(), "page": page}})
        for page in (False, True)
    }
    found: dict[str, Any] = {"wall": {}, "cpu": {}, "read_seconds": [], "rss_mib": []}
    order, until = random.Random(0), time.monotonic() + seconds
    for number in range(rounds + 2):
        if number >= 5 and time.monotonic() > until:  # three rounds at least
            break
        for name, page, traced in order.sample(CASES, len(CASES)):
            wall, cpu, names = answer(engines[page], traced)
            spent = read(engines[page], names) if traced else 0.0
            if number < 2:  # warms up
                continue
            found["wall"].setdefault(name, []).append(wall)
            found["cpu"].setdefault(name, []).append(cpu)
            if traced:
                found["read_seconds"].append(spent)
        if number >= 2:
            found["rss_mib"].append(resident_mib())
    return found


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 2)


def answer(llm: Any, traced: bool) -> tuple[float, float, list[str]]:
    """Wall and CPU seconds of all requests at once, and their ids."""
    from vllm import SamplingParams

    extra = {"eos_trace": True} if traced else None
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, extra_args=extra)
    prompts = [
        {"prompt": f"USER: <image>\nWhat, {i}? ASSISTANT:", "multi_modal_data": {"image": sample_image(i)}}
        for i in range(REQUESTS)
    ]
    llm.reset_prefix_cache()
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - wall, time.process_time() - cpu, [out.request_id for out in outputs]


def read(llm: Any, names: list[str]) -> float:
    """Seconds to read these traces, documents included."""
    from eos_vllm.serving.trace_book import eos_trace
    from eos_vllm.serving.trace_document import Outline, Record, build_trace

    began = time.perf_counter()
    for name in names:
        answer = eos_trace(llm.llm_engine.engine_core.engine_core, name)
        assert answer is not None, name
        records = [Record.model_validate(record) for record in answer["records"]]
        trace = build_trace(Outline.model_validate(answer["outline"]), records)
        assert trace.images[0].reducers, name
    return time.perf_counter() - began


def ratios(result: dict[str, Any], over: str) -> dict[str, dict[str, dict[str, float]]]:
    """Geometric mean of each case over the case ``over``, with its 95 % interval over rounds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for clock in ("wall", "cpu"):
        base = result[clock][over]
        for name, values in result[clock].items():
            logs = [math.log(ours / theirs) for ours, theirs in zip(values, base, strict=True)]
            mean, wide = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
            interval = {"ratio": math.exp(mean), "low": math.exp(mean - wide), "high": math.exp(mean + wide)}
            found.setdefault(name, {})[clock] = interval
    return found


def table(result: dict[str, Any]) -> str:
    """Medians and ratios, by clock."""
    lines = ["| case | wall s | over no page | CPU s | over no page |", "| --- | --- | --- | --- | --- |"]
    for name, _, _ in CASES:
        cells = [name]
        for clock in ("wall", "cpu"):
            ratio = shown(result["over_no_page"][name][clock])
            cells += [f"{statistics.median(result[clock][name]):.3f}", "" if name == BASE else ratio]
        lines.append(f"| {' | '.join(cells)} |")
    traced = result["over_not_traced"][TRACED]
    reading = 1000 * statistics.median(result["read_seconds"]) / REQUESTS
    lines += ["", f"Traced over not traced, one engine: wall {shown(traced['wall'])}, CPU {shown(traced['cpu'])}."]
    lines += ["", f"Reading a trace afterwards: {reading:.2f} ms."]
    if rss := result["rss_mib"]:
        fifth = len(rss) // 5
        traced_in_all = REQUESTS * len(rss)
        lines += [
            "",
            f"Memory over {traced_in_all} traced requests, mean of each fifth in MiB: "
            + ", ".join(f"{statistics.mean(rss[k * fifth : (k + 1) * fifth]):.1f}" for k in range(5))
            + ".",
        ]
    return "\n".join(lines)


def shown(ratio: dict[str, float]) -> str:
    """With its interval."""
    return f"{ratio['ratio']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"


if __name__ == "__main__":
    raise SystemExit(main())
