"""A decode step with a profile that keeps all tokens against stock's: what the plugin costs where it gains nothing.

    python -m benchmarks.decode_step --out results/decode-step-cpu.json      # six minutes, most of them compiling

Two compiled engines in one process, each with its own defaults, answer the same requests in turn.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from eos_vllm.models.tiny import PRESETS
from loadtests.origin import origin

TOKENS = 96


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=20, help="requests of each engine (default: %(default)s)")
    parser.add_argument("--budgets", default="576,64", help="of the engine with a profile (default: %(default)s)")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    common.engines_in_process()
    budgets = [int(budget) for budget in args.budgets.split(",")]
    with common.random_model(PRESETS[args.preset]) as model:
        return {
            "provenance": origin(seed=0),
            "settings": {"preset": args.preset, "profile": common.PROFILE, "pairs": args.pairs, "tokens": TOKENS},
            "milliseconds": by_case(model, args.pairs, budgets),
        }


def by_case(model: Path, pairs: int, budgets: list[int]) -> dict[str, list[float]]:
    """Milliseconds of a decode step in each request, by engine and budget."""
    from vllm import LLM

    from eos_vllm.core.budget import REQUEST_FIELD

    profile = common.scaled_profile(model)
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
    for pair, name, counts in common.turns(list(cases), pairs):
        llm, extra = cases[name]
        step = 1000 * (answer(llm, pair, 1 + TOKENS, extra) - answer(llm, pair, 1, extra)) / TOKENS
        if counts:
            found[name].append(step)
    return found


def answer(llm: Any, seed: int, tokens: int, extra: dict[str, Any] | None) -> float:
    """Seconds of one request; the prompt is in the prefix cache from the second time on, so only decoding differs."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra)
    prompt = common.prompt(f"What, {seed}?", seed)
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, extra_args=extra), use_tqdm=False)
    began = time.perf_counter()
    llm.generate([prompt], params, use_tqdm=False)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """Medians, and the geometric mean over stock's with its 95 % interval over pairs."""
    found = result["milliseconds"]
    lines = ["| engine | ms a step | over stock |", "| --- | --- | --- |"]
    for name, values in found.items():
        over = "" if name == "stock" else common.shown(*common.ratio(values, found["stock"]).values())
        label = name if name == "stock" else f"budget {name}"
        lines.append(f"| {label} | {statistics.median(values):.2f} | {over} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
