"""Stock vLLM against eos-vllm, interleaved, same settings: requests per second and the share of the plan's ceiling.

    python -m benchmarks.throughput --out results/throughput-cpu.json      # twenty minutes on 2 cores

Two engines live side by side and take turns, so that a machine whose speed drifts slows both: a round goes from stock
over every budget and back. Figures are medians over rounds of ratios to stock in the same round, with their range.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import common
from eos_vllm.analysis.comparison import compare
from eos_vllm.analysis.cost import layer_flops
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.geometry import geometry
from eos_vllm.models.tiny import PRESETS, parameter_count
from loadtests.origin import origin

BUDGETS = (576, 192, 64, 16)
TEXT_TOKENS = 88  # with 576 visual tokens the prompt of the design's ceilings
BLOCK = 32


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--model", default=None, help="directory of a model to use instead of a preset")
    parser.add_argument("--requests", type=int, default=24, help="requests per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, each there and back (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--kv", choices=("large", "bound", "both"), default="both")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile (both engines); default: eager")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    with nullcontext(args.model) if args.model else common.random_model(PRESETS[args.preset]) as model:
        profile = bench_profile(Path(model))
        cases = [one_case(args, model, profile, kv) for kv in (("large", "bound") if args.kv == "both" else (args.kv,))]
    return {
        "provenance": origin(seed=0),
        "model": {"name": args.preset if args.model is None else Path(args.model).name}
        | ({"parameters": parameter_count(PRESETS[args.preset])} if args.model is None else {}),
        "settings": {
            "dtype": "float32",
            "eager": not args.compile,
            "requests_per_turn": args.requests,
            "rounds": args.rounds,
            "output_tokens": args.max_tokens,
            "block_size": BLOCK,
            "images": "distinct in every request",
            "prefix_caching": False,
            "chunked_prefill": "off in both",
            "runner": "V1 in both",
        },
        "profile": profile.to_dict(),
        "cases": cases,
    }


def bench_profile(model: Path) -> Profile:
    """Scaled; budgets other than its schedules' by the final count, for 16 has no schedule."""
    return parse_profile(
        common.scaled_profile(model).to_dict() | {"budget": {"measure": "final", "tokens": 64, "minimum": 1}}
    )


def one_case(args: argparse.Namespace, model: Any, profile: Profile, kv: str) -> dict[str, Any]:
    """One case: both engines, warmed up, then all rounds."""
    shape = geometry(Path(model))
    per_block = shape.kv_bytes_per_token(4) * BLOCK * shape.num_decoder_layers
    # Bound: about two and a half stock requests fit; large: all of a turn and more.
    blocks = 22 * (5 if kv == "bound" else 4 * args.requests * 2) // 2
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": not args.compile,
        "max_model_len": 704,
        "max_num_batched_tokens": 2816,
        "kv_cache_memory_bytes": blocks * per_block,
        "block_size": BLOCK,
        "limit_mm_per_prompt": {"image": 1},
        "disable_log_stats": True,
    }
    # What keeping all tokens costs shows best where nothing waits for KV blocks.
    budgets = BUDGETS if kv == "large" else BUDGETS[1:]
    from vllm import LLM

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    settings |= {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    stock = LLM(**settings)
    eos = LLM(**settings, additional_config={"eos": {"profile": profile.to_dict()}})
    turn = Turn(args)
    for engine in (stock, eos):
        turn.take(engine, None if engine is stock else 64, args.requests // 4)
    rounds = []
    for n in range(args.rounds):
        # There and back, so that a machine that slows down as it works slows all settings alike.
        order: list[int | None] = [None, *budgets]
        times: dict[str, float] = {}
        for budget in [*order, *reversed(order)]:
            name = str(budget or "stock")
            times[name] = times.get(name, 0.0) + 0.5 / turn.take(stock if budget is None else eos, budget)
        speeds = {name: 1 / seconds for name, seconds in times.items()}
        rounds.append(speeds)
        print(f"{kv}: round {n + 1}: " + ", ".join(f"{k} {v:.3f}/s" for k, v in speeds.items()), file=sys.stderr)
    prompt = turn.prompt_tokens
    ceilings = {str(b): ceiling(model, profile, prompt, args.max_tokens, b) for b in budgets}
    for engine in (stock, eos):
        engine.llm_engine.engine_core.shutdown()
    return {
        "kv": kv,
        "kv_cache_mib": blocks * per_block / 2**20,
        "prompt_tokens": prompt,
        "requests_per_second": rounds,
        "ceilings": ceilings,
    }


class Turn:
    """Sends the requests of one turn at once; no image is ever sent twice."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sent = 0
        self.prompt_tokens = 0

    def take(self, llm: Any, budget: int | None, requests: int | None = None) -> float:
        """Requests per second of one turn of ``requests``."""
        from vllm import SamplingParams

        extra = None if budget is None else {REQUEST_FIELD: budget}
        params = SamplingParams(temperature=0, max_tokens=self.args.max_tokens, ignore_eos=True, extra_args=extra)
        numbers = range(self.sent, self.sent + (requests or self.args.requests))
        self.sent = numbers.stop
        prompts = [common.prompt(question(n), n) for n in numbers]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(out.outputs[0].token_ids) == self.args.max_tokens for out in outputs)
        self.prompt_tokens = len(outputs[0].prompt_token_ids)
        return len(prompts) / elapsed


def question(number: int) -> str:
    """What makes a prompt of ``TEXT_TOKENS`` tokens of text: one per byte, and the begin token."""
    asked = f"What is in picture number {number}, and where is it? "
    return (asked * 3)[: TEXT_TOKENS - 1 - len("USER: \n ASSISTANT:")]


def ceiling(model: Any, profile: Profile, prompt: int, outputs: int, budget: int) -> dict[str, float]:
    """What the plan promises if reducing were free: by tokens over layers (prompt and output), and by FLOPs."""
    shape, planner = geometry(Path(model)), Planner(profile, block=BLOCK)
    plan = planner.plan(prompt, [ImageSpan(5, shape.visual_tokens)], budget)
    layers = profile.segment_layers()
    ours = sum(n * (plan.segment_length(s, prompt) + outputs) for s, n in enumerate(layers))
    flops = compare(shape, planner, prompt - shape.visual_tokens, 1, budget, "float32", BLOCK)
    decode = outputs * shape.num_decoder_layers * layer_flops(shape, 1)
    return {
        "by_tokens": sum(layers) * (prompt + outputs) / ours,
        "by_flops": (flops.stock.flops + decode) / (flops.reduced.flops + decode),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: medians, ranges and shares."""
    lines = []
    for case in result["cases"]:
        stock = [r["stock"] for r in case["requests_per_second"]]
        lines.append(
            f"KV cache {case['kv']} ({case['kv_cache_mib']:.0f} MiB), {case['prompt_tokens']} prompt tokens; "
            f"stock {statistics.median(stock):.3f} requests/s ({min(stock):.3f} to {max(stock):.3f})"
        )
        lines.append("| budget | requests/s | against stock (range) | ceiling by tokens | share | by FLOPs | share |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for budget, promised in case["ceilings"].items():
            speeds = [r[budget] for r in case["requests_per_second"]]
            ratios = [r[budget] / r["stock"] for r in case["requests_per_second"]]
            ratio = statistics.median(ratios)
            lines.append(
                f"| {budget} | {statistics.median(speeds):.3f} | {common.shown(ratio, min(ratios), max(ratios), 2)} "
                f"| {promised['by_tokens']:.2f} | {ratio / promised['by_tokens']:.0%} "
                f"| {promised['by_flops']:.2f} | {ratio / promised['by_flops']:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
