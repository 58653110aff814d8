"""Stock vLLM against eos-vllm, interleaved, same settings: requests per second and the share of the plan's ceiling.

    python benchmarks/throughput.py --out results/throughput-cpu.json      # twenty minutes on 2 cores
    python benchmarks/throughput.py --table results/throughput-cpu.json    # prints the table of a result again

Two engines live side by side and take turns, so that a machine whose speed drifts slows both: a round goes from stock
over every budget and back. Figures are medians over rounds of ratios to stock in the same round, with their range.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.analysis.comparison import compare
from eos_vllm.analysis.cost import layer_flops
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import PRESETS, parameter_count, write_tiny_model
from eos_vllm.provenance import provenance

BUDGETS = (576, 192, 64, 16)
TEXT_TOKENS = 88  # with 576 visual tokens the prompt of the design's ceilings
BLOCK = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--model", default=None, help="directory of a model to use instead of a preset")
    parser.add_argument("--requests", type=int, default=24, help="requests per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, each there and back (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--kv", choices=("large", "bound", "both"), default="both")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile (both engines); default: eager")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print the table of this result, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    with tempfile.TemporaryDirectory(prefix="eos-bench-") as folder:
        model = args.model or write_tiny_model(Path(folder) / "model", shape=PRESETS[args.preset])
        profile = bench_profile(Path(model))
        cases = [measure(args, model, profile, kv) for kv in (("large", "bound") if args.kv == "both" else (args.kv,))]
    result = {
        "provenance": provenance(seed=0),
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
    if args.out:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def bench_profile(model: Path) -> Profile:
    """SparseVLM v2's schedules on this model's depth; other budgets by the final count, for 16 has no schedule."""
    shape = geometry(model)
    scaled = scale_to_model(profiles.load("sparsevlm-v2-llava-1.5-7b"), shape.num_decoder_layers, shape.visual_tokens)
    return parse_profile(scaled.to_dict() | {"budget": {"measure": "final", "tokens": 64, "minimum": 1}})


def measure(args: argparse.Namespace, model: Any, profile: Profile, kv: str) -> dict[str, Any]:
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
        prompts = [
            {
                "prompt": question(n),
                "multi_modal_data": {"image": sample_image(n)},
            }
            for n in numbers
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(out.outputs[0].token_ids) == self.args.max_tokens for out in outputs)
        self.prompt_tokens = len(outputs[0].prompt_token_ids)
        return len(prompts) / elapsed


def question(number: int) -> str:
    """A prompt with one image and ``TEXT_TOKENS`` tokens of text: one per byte, and the begin token."""
    head, tail = "USER: <image>\n", " ASSISTANT:"
    asked = f"What is in picture number {number}, and where is it? "
    room = TEXT_TOKENS - 1 - len(head.replace("<image>", "")) - len(tail)
    return head + (asked * 3)[:room] + tail


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
                f"| {budget} | {statistics.median(speeds):.3f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {promised['by_tokens']:.2f} | {ratio / promised['by_tokens']:.0%} "
                f"| {promised['by_flops']:.2f} | {ratio / promised['by_flops']:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
