"""Prefill of reduced prompts in one compiled engine: the reducing pass compiled against the same pass run eagerly.

    python -m benchmarks.compiled_reduction --out results/compiled-reduction-cpu.json      # minutes

The two take turns, request by request, with a new image each time; answers of both are compared.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.models.tiny import PRESETS
from loadtests.origin import origin

BUDGETS = (192, 64)
TEXT = "Which of the things in this image is the largest one? " * 2


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=20, help="requests of each kind and budget (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    common.engines_in_process()
    with common.random_model(PRESETS[args.preset]) as model:
        return {
            "provenance": origin(seed=0),
            "settings": {"preset": args.preset, "profile": common.PROFILE, "pairs": args.pairs, "dtype": args.dtype},
            "budgets": by_budget(args, model),
        }


def by_budget(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Seconds of each prefill, compiled and eager in turn, by budget."""
    from vllm import LLM

    from eos_vllm.serving.stretches import Stretch, stretches

    profile = common.scaled_profile(model)
    llm = LLM(
        str(model),
        dtype=args.dtype,
        max_model_len=1024,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1},
        additional_config={"eos": {"profile": profile.to_dict()}},
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker  # type: ignore[attr-defined]
    reduction = worker.model_runner.get_model().eos
    compiled = reduction.parts
    assert any(isinstance(part, Stretch) and part._run != part._layer_by_layer for part in compiled), "not compiled"
    eager = list(stretches(reduction.decoder.layers, reduction.layers, profile.layers, compiled=False))
    found, first = [], 0
    for budget in BUDGETS:
        seconds: dict[str, list[float]] = {"compiled": [], "eager": []}
        answers: dict[str, list[list[int]]] = {"compiled": [], "eager": []}
        for pair, (name, parts), counts in common.turns([("compiled", compiled), ("eager", eager)], args.pairs):
            reduction.parts = parts
            took, tokens = prefill(llm, budget, first + pair)
            answers[name].append(tokens)
            if counts:
                seconds[name].append(took)
        same = [a == b for a, b in zip(answers["compiled"], answers["eager"], strict=True)]
        first += len(same)
        found.append({"budget": budget, "seconds": seconds, "same_answers": sum(same), "pairs": len(same)})
    return found


def prefill(llm: Any, budget: int, seed: int) -> tuple[float, list[int]]:
    """Seconds of one request up to its first token; that token and the log-probabilities' order of the best five."""
    from vllm import SamplingParams

    prompt = common.prompt(f"{TEXT}{seed}", seed)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=5, extra_args={REQUEST_FIELD: budget})
    llm.reset_mm_cache()
    began = time.perf_counter()
    output = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    return time.perf_counter() - began, list(output.logprobs[0])


def table(result: dict[str, Any]) -> str:
    """Medians, and the geometric mean of eager over compiled with its 95 % interval over pairs."""
    lines = [
        "| budget | compiled, s | eager, s | eager over compiled | same answers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in result["budgets"]:
        compiled, eager = case["seconds"]["compiled"], case["seconds"]["eager"]
        lines.append(
            f"| {case['budget']} | {statistics.median(compiled):.3f} | {statistics.median(eager):.3f} "
            f"| {common.shown(*common.ratio(eager, compiled).values())} | {case['same_answers']} of {case['pairs']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
