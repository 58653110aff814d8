"""Prefill of reduced prompts in one compiled engine: the reducing pass compiled against the same pass run eagerly.

    python benchmarks/compiled_reduction.py --out results/compiled-reduction-cpu.json      # minutes
    python benchmarks/compiled_reduction.py --table results/compiled-reduction-cpu.json

The two take turns, request by request, with a new image each time; answers of both are compared.
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
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import PRESETS, write_tiny_model
from eos_vllm.provenance import provenance

PROFILE = "sparsevlm-v2-llava-1.5-7b"
BUDGETS = (192, 64)
TEXT = "Which of the things in this image is the largest one? " * 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench-88m", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=20, help="requests of each kind and budget (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print the table of this result, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory(prefix="eos-compiled-") as folder:
        model = write_tiny_model(Path(folder) / "model", shape=PRESETS[args.preset])
        result = {
            "provenance": provenance(seed=0),
            "settings": {"preset": args.preset, "profile": PROFILE, "pairs": args.pairs, "dtype": args.dtype},
            "budgets": measure(args, model),
        }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def measure(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Seconds of each prefill, compiled and eager in turn, by budget."""
    from vllm import LLM

    from eos_vllm.serving.stretches import Stretch, stretches

    shape = geometry(model)
    profile = scale_to_model(profiles.load(PROFILE), shape.num_decoder_layers, shape.visual_tokens)
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
    found, seed = [], 0
    for budget in BUDGETS:
        seconds: dict[str, list[float]] = {"compiled": [], "eager": []}
        same = 0
        for pair in range(args.pairs + 2):
            answers = []
            order = [("compiled", compiled), ("eager", eager)]
            for name, parts in order if pair % 2 else reversed(order):
                reduction.parts = parts
                took, tokens = prefill(llm, budget, seed)
                answers.append(tokens)
                if pair >= 2:  # the first two warm up
                    seconds[name].append(took)
            same += answers[0] == answers[1]
            seed += 1
        found.append({"budget": budget, "seconds": seconds, "same_answers": same, "pairs": args.pairs + 2})
    return found


def prefill(llm: Any, budget: int, seed: int) -> tuple[float, list[int]]:
    """Seconds of one request up to its first token; that token and the log-probabilities' order of the best five."""
    from vllm import SamplingParams

    prompt = {"prompt": f"USER: <image>\n{TEXT}{seed} ASSISTANT:", "multi_modal_data": {"image": sample_image(seed)}}
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
        logs = [math.log(b / a) for a, b in zip(compiled, eager, strict=True)]
        mean, wide = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
        ratio = f"{math.exp(mean):.3f} ({math.exp(mean - wide):.3f} to {math.exp(mean + wide):.3f})"
        lines.append(
            f"| {case['budget']} | {statistics.median(compiled):.3f} | {statistics.median(eager):.3f} | {ratio} "
            f"| {case['same_answers']} of {case['pairs']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
