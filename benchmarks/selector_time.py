"""What a selector costs: milliseconds per image, and its share of an image's tower and prefill, on this machine.

    python -m benchmarks.selector_time --out results/selector-time-cpu.json

The model has random weights: time does not depend on them. Selectors take turns with tower and prefill, and figures are
medians with quartiles. The prefill is Hugging Face's of one prompt of 88 text tokens, whole and with what is kept.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from benchmarks import common
from eos_search.tower import tower_output
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.preselection import preselect
from eos_vllm.core.selectors import SELECTORS, Selector
from eos_vllm.models.tiny import PRESETS
from loadtests.origin import origin

PRESET, TEXT = "bench-88m", 88
COUNTS = (64, 192)
PRUNE = OperatorParams(0.0, 1.0, 0.0, 0.0, 0.0)
TRANSFER = OperatorParams(0.2, 0.1, 0.0, 0.0, 0.0)


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds of one call; devices are waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def selectors() -> dict[str, Selector]:
    """Each rule with its defaults; ``resize`` works in front of the tower and costs less than nothing."""
    return {
        rule: kind.model_validate({"rule": rule} | ({"shallow_layer": 0} if rule == "window_topk" else {}))
        for rule, kind in SELECTORS.items()
        if rule != "resize"
    }


@torch.inference_mode()
def by_name(rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each thing, once per round."""
    found: dict[str, list[float]] = {}
    with common.random_model(PRESETS[PRESET]) as path:
        model = AutoModelForImageTextToText.from_pretrained(str(path), dtype=torch.float32).eval().to(device)
    size, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    pixels = torch.randn(1, 3, size, size, device=device)
    prompts = {n: torch.randn(1, n + TEXT, width, device=device) for n in (576, *COUNTS)}
    topk = selectors()["topk"]
    outputs = {name: tower_output(model, pixels, selector) for name, selector in selectors().items()}
    for round_number in range(rounds + 1):
        now = {"tower and projector": timed(lambda: tower_output(model, pixels, selectors()["topk"]).projected)}
        for n, prompt in prompts.items():
            now[f"prefill, {n} visual tokens"] = timed(lambda p=prompt: model.model.language_model(inputs_embeds=p))
        for name, selector in selectors().items():
            for keep in COUNTS:
                now[f"{name}, {keep}"] = timed(lambda n=name, s=selector, k=keep: preselect(outputs[n], s, PRUNE, k))
        for keep in COUNTS:
            now[f"operator after topk, {keep}"] = timed(lambda k=keep: preselect(outputs["topk"], topk, TRANSFER, k))
        if round_number:  # the first one warms up
            for name, value in now.items():
                found.setdefault(name, []).append(round(value, 3))
    return found


def table(result: dict[str, Any]) -> str:
    """Milliseconds, and shares of tower and prefill, as Markdown."""
    found = {name: statistics.median(values) for name, values in result["milliseconds"].items()}
    tower = found["tower and projector"]
    whole = tower + found["prefill, 576 visual tokens"]
    smaller = ", ".join("{:.1f} ms with {}".format(found[f"prefill, {k} visual tokens"], k) for k in COUNTS)
    lines = [
        f"Tower and projector {tower:.1f} ms, prefill {found['prefill, 576 visual tokens']:.1f} ms ({smaller}).",
        "",
        "| selector | " + " | ".join(f"ms at {k} | of stock | of reduced" for k in COUNTS) + " |",
        "| --- |" + " --- |" * 3 * len(COUNTS),
    ]
    for name in [n.removesuffix(f", {COUNTS[0]}") for n in found if n.endswith(f", {COUNTS[0]}")]:
        cells = []
        for keep in COUNTS:
            values = result["milliseconds"][f"{name}, {keep}"]
            low, middle, high = statistics.quantiles(values, n=4)
            reduced = tower + found[f"prefill, {keep} visual tokens"]
            cells.append(f"{common.shown(middle, low, high, 2)} | {middle / whole:.1%} | {middle / reduced:.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, or prints a table; returns 0."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"preset": PRESET, "text": TEXT, "counts": list(COUNTS), "rounds": args.rounds, "device": device}
    return {"provenance": origin(seed=0), "settings": settings, "milliseconds": by_name(args.rounds, device)}


if __name__ == "__main__":
    raise SystemExit(main())
