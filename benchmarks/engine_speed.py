"""How many questions a second an engine answers under a profile at each cost, each engine between two of stock."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.profile import Profile

REQUESTS, REPEATS = 48, 3


def speeds(
    model: Path, rows: Sequence[Row], wanted: Iterable[tuple[str, Profile, Sequence[int]]]
) -> Iterator[dict[str, Any]]:
    """Speeds of profiles one after the other; the engine of stock behind one is the one in front of the next.

    Args:
        model: directory of the model.
        rows: questions, of which some are asked, each about an image that nothing has seen.
        wanted: name, profile and costs of each.

    Yields:
        ``profile``, ``stock`` and by cost ``requests_per_second``, each a list with a figure for each round.
    """
    before: list[float] = []
    for name, profile, costs in wanted:
        before = before or run_engine(model, rows, None, [])[0]
        ours, after = run_engine(model, rows, profile, costs), run_engine(model, rows, None, [])[0]
        yield {
            "profile": name,
            "stock": before + after,
            "requests_per_second": {str(cost): ours[cost] for cost in costs},
        }
        before = after


def run_engine(
    model: Path, rows: Sequence[Row], profile: Profile | None, costs: Sequence[int]
) -> dict[int, list[float]]:
    """Requests per second of one engine with its own defaults, exact counts, by cost; 0 stands for stock."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    extra: dict[str, Any] = {}
    if profile is not None:
        eos = {"profile": profile.to_dict(), "retain": max(costs), "exact_counts": True}
        extra["additional_config"] = {"eos": eos}
    llm: Any = LLM(str(model), dtype="float32", max_model_len=2048, kv_cache_memory_bytes=256 << 20, **extra)
    try:
        chosen = rows[:: max(1, len(rows) // REQUESTS)][:REQUESTS]
        images = [Image.open(row.image_files[0]).convert("RGB") for row in chosen]
        found: dict[int, list[float]] = {}
        for repeat in range(REPEATS + 1):
            for cost in costs if profile is not None else [0]:
                # Other pixels each time, so that nothing is cached.
                shifted = [stamped(image, repeat * 1000 + cost) for image in images]
                prompts = [
                    {"prompt": f"USER: <image>\n{row.prompt} ASSISTANT:", "multi_modal_data": {"image": image}}
                    for row, image in zip(chosen, shifted, strict=True)
                ]
                budget = {REQUEST_FIELD: cost} if cost else None
                params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=budget)
                start = time.monotonic()
                llm.generate(prompts, params, use_tqdm=False)
                if repeat:  # the first round warms up
                    found.setdefault(cost, []).append(round(len(prompts) / (time.monotonic() - start), 3))
        return found
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def stamped(image: Any, number: int) -> Any:
    """The image with a number in its first pixels."""
    copy = image.copy()
    for i in range(4):
        copy.putpixel((i, 0), ((number >> (8 * i)) & 255, number % 251, i))
    return copy
