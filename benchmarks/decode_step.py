"""A decode step with a profile that keeps all tokens against stock's: what the plugin costs where it gains nothing.

    python benchmarks/decode_step.py --out results/decode-step-cpu.json      # six minutes, most of them compiling
    python benchmarks/decode_step.py --table results/decode-step-cpu.json

Two compiled engines in one process, each with its own defaults, answer the same requests in turn.
"""

import argparse
import json
import math
import os
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
TOKENS = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=20, help="requests of each engine (default: %(default)s)")
    parser.add_argument("--budgets", default="576,64", help="of the engine with a profile (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print the table of this result, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    budgets = [int(budget) for budget in args.budgets.split(",")]
    with tempfile.TemporaryDirectory(prefix="eos-decode-") as folder:
        model = write_tiny_model(Path(folder) / "model", shape=PRESETS[args.preset])
        result = {
            "provenance": provenance(seed=0),
            "settings": {"preset": args.preset, "profile": PROFILE, "pairs": args.pairs, "tokens": TOKENS},
            "milliseconds": measure(model, args.pairs, budgets),
        }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def measure(model: Path, pairs: int, budgets: list[int]) -> dict[str, list[float]]:
    """Milliseconds of a decode step in each request, by engine and budget."""
    from vllm import LLM

    from eos_vllm.core.budget import REQUEST_FIELD

    shape = geometry(model)
    profile = scale_to_model(profiles.load(PROFILE), shape.num_decoder_layers, shape.visual_tokens)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 512 << 20,
        "limit_mm_per_prompt": {"image": 1},
    }
    stock = LLM(str(model), **settings)
    eos = LLM(str(model), **settings, additional_config={"eos": {"profile": profile.to_dict()}})
    cases = {"stock": (stock, None)} | {str(b): (eos, {REQUEST_FIELD: b}) for b in budgets}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for pair in range(pairs + 2):
        for name in list(cases) if pair % 2 else list(cases)[::-1]:
            llm, extra = cases[name]
            step = 1000 * (answer(llm, pair, 1 + TOKENS, extra) - answer(llm, pair, 1, extra)) / TOKENS
            if pair >= 2:  # the first two warm up
                found[name].append(step)
    return found


def answer(llm: Any, seed: int, tokens: int, extra: dict[str, Any] | None) -> float:
    """Seconds of one request; the prompt is in the prefix cache from the second time on, so only decoding differs."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra)
    prompt = {"prompt": f"USER: <image>\nWhat, {seed}? ASSISTANT:", "multi_modal_data": {"image": sample_image(seed)}}
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, extra_args=extra), use_tqdm=False)
    began = time.perf_counter()
    llm.generate([prompt], params, use_tqdm=False)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """Medians, and the geometric mean over stock's with its 95 % interval over pairs."""
    found = result["milliseconds"]
    lines = ["| engine | ms a step | over stock |", "| --- | --- | --- |"]
    for name, values in found.items():
        logs = [math.log(ours / theirs) for ours, theirs in zip(values, found["stock"], strict=True)]
        mean, wide = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
        ratio = f"{math.exp(mean):.3f} ({math.exp(mean - wide):.3f} to {math.exp(mean + wide):.3f})"
        label = name if name == "stock" else f"budget {name}"
        lines.append(f"| {label} | {statistics.median(values):.2f} | {'' if name == 'stock' else ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
