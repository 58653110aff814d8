"""What traces cost: 24 requests at once, in an engine without the page, with it, and with every request traced.

    python -m benchmarks.trace_cost --out results/trace-cost.json      # ten minutes

Two engines in one process answer the same requests in turn, each time with empty prefix caches. The model is small, so
that what is added weighs more than it would on a real one. Beside wall time stands the process' CPU time, which other
processes of the machine disturb less.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from eos_vllm.core.errors import SettingError
from eos_vllm.models.geometry import geometry
from eos_vllm.models.tiny import PRESETS
from loadtests.origin import origin

REQUESTS, TOKENS = 24, 16
# Name, whether its engine has the page, whether its requests are traced.
CASES = (("no page", False, False), ("page, not traced", True, False), ("page, all traced", True, True))
BASE, SAME, TRACED = (name for name, _, _ in CASES)


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", default="embedded", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=420, help="of all cases, in random order (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="begin no round after these (default: %(default)s)")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    if args.rounds < 2:
        raise SettingError("rounds", args.rounds, "one has no interval", "give 2 or more")
    common.engines_in_process(OMP_NUM_THREADS="1")
    settings = {"preset": args.preset, "profile": common.PROFILE, "requests": REQUESTS, "tokens": TOKENS}
    with common.random_model(PRESETS[args.preset]) as model:
        measured = in_rounds(model, args.rounds, args.seconds)
    result = {"provenance": origin(seed=0), "settings": settings, **measured}
    result["over_no_page"] = ratios(result, BASE)
    # One engine: what its place in memory is worth against the other one's is no part of this.
    result["over_not_traced"] = {TRACED: ratios(result, SAME)[TRACED]}
    return result


def in_rounds(model: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of each round by case, wall and CPU; seconds to read the traces of a round."""
    from vllm import LLM

    profile, shape = common.scaled_profile(model), geometry(model)
    per_token = shape.kv_bytes_per_token(4) * shape.num_decoder_layers
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": REQUESTS,
        # Room for all of them at once, unreduced.
        "kv_cache_memory_bytes": max(256 << 20, REQUESTS * 736 * per_token),
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
    prompts = [common.prompt(f"What, {i}?", i) for i in range(REQUESTS)]
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
            found.setdefault(name, {})[clock] = common.ratio(values, base)
    return found


def table(result: dict[str, Any]) -> str:
    """Medians and ratios, by clock."""
    lines = ["| case | wall s | over no page | CPU s | over no page |", "| --- | --- | --- | --- | --- |"]
    for name, _, _ in CASES:
        cells = [name]
        for clock in ("wall", "cpu"):
            over = "" if name == BASE else common.shown(*result["over_no_page"][name][clock].values(), 4)
            cells += [f"{statistics.median(result[clock][name]):.3f}", over]
        lines.append(f"| {' | '.join(cells)} |")
    wall, cpu = (common.shown(*result["over_not_traced"][TRACED][clock].values(), 4) for clock in ("wall", "cpu"))
    reading = 1000 * statistics.median(result["read_seconds"]) / REQUESTS
    lines += ["", f"Traced over not traced, one engine: wall {wall}, CPU {cpu}."]
    lines += ["", f"Reading a trace afterwards: {reading:.2f} ms."]
    if len(rss := result["rss_mib"]) >= 5:
        fifth = len(rss) // 5
        traced_in_all = REQUESTS * len(rss)
        lines += [
            "",
            f"Memory over {traced_in_all} traced requests, mean of each fifth in MiB: "
            + ", ".join(f"{statistics.mean(rss[k * fifth : (k + 1) * fifth]):.1f}" for k in range(5))
            + ".",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
