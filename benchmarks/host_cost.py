"""What the reduction costs on the host, apart from any model: scheduler, batch and layout, against stock's.

    python -m benchmarks.host_cost --out results/host-cost.json      # two minutes

A model of 32 thin layers gives vLLM's real scheduler LLaVA-1.5-7B's KV groups (12 with SparseVLM's reducers). A
stand-in answers for the worker, so that a step costs the host's work alone. Figures are medians with quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common
from eos_vllm import profiles
from eos_vllm.core.layout import Entry, build_layout
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile
from eos_vllm.models.tiny import PRESETS
from loadtests.origin import origin

BEFORE_PROFILE = "divprune-llava-1.5-7b"
BUDGET = 64
TEXT, BEFORE = 88, 5
REQUESTS = (64, 256)
STEPS = 96


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="engines of each kind, in turn (default: %(default)s)")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    common.engines_in_process()
    profile, before = profiles.load(common.PROFILE), profiles.load(BEFORE_PROFILE)
    result: dict[str, Any] = {
        "provenance": origin(seed=0),
        "settings": {"profile": common.PROFILE, "budget": BUDGET, "text": TEXT, "steps": STEPS, "rounds": args.rounds},
        "milliseconds": {},
    }
    figures: dict[str, list[float]] = {}
    with common.random_model(thin_model()) as model:
        for _ in range(args.rounds):
            for name, chosen in (("stock", None), ("eos", profile), ("selects before, eos", before)):
                with small_engine(model, chosen) as llm:
                    for count in REQUESTS:
                        key = f"scheduler, decode step, {count} requests, {name}"
                        figures.setdefault(key, []).extend(decode_steps(llm, count))
                    if chosen is profile:
                        result["settings"]["kv_groups"] = kv_groups(llm)
    figures |= batch_and_layout(profile)
    result["milliseconds"] = {name: summary(values) for name, values in figures.items()}
    return result


def thin_model() -> Any:
    """LLaVA-1.5-7B's depth and images, and next to no width."""
    return replace(
        PRESETS["embedded"],
        num_decoder_layers=32,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    )


@contextmanager
def small_engine(model: Path, profile: Profile | None) -> Iterator[Any]:
    """An in-process engine with room for all requests, for its scheduler."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    extra: dict[str, Any] = {"enable_prefix_caching": True, "block_size": 32}
    if profile is not None:
        extra["additional_config"] = {"eos": {"profile": profile.to_dict(), "retain": BUDGET}}
    # A block holds the keys of one KV group: of all layers in stock, of a twelfth of them here.
    blocks = (1 if profile is None or not profile.inside else 12) * max(REQUESTS) * (576 + TEXT + STEPS + 64) // 32
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=max(REQUESTS),
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=64 << 20,
        **extra,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def kv_groups(llm: Any) -> int:
    return len(scheduler_of(llm).kv_cache_config.kv_cache_groups)


def decode_steps(llm: Any, count: int) -> list[float]:
    """Milliseconds that ``schedule`` takes in each decode step of ``count`` requests, all prefilled."""
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    scheduler = scheduler_of(llm)
    hasher = get_request_block_hasher(32, get_hash_fn_by_name("sha256"))
    for i in range(count):
        image = MultiModalFeatureSpec(None, "image", f"image {i}", PlaceholderRange(BEFORE, 576))
        scheduler.add_request(
            Request(
                request_id=f"{count}-{i}",
                prompt_token_ids=[3 + i % 50] * (576 + TEXT),
                sampling_params=SamplingParams(max_tokens=STEPS + 8, ignore_eos=True),
                pooling_params=None,
                mm_features=[image],
                block_hasher=hasher,
            )
        )
    spent = []
    while scheduler.has_unfinished_requests():
        began = time.perf_counter()
        step = scheduler.schedule()
        took = 1000 * (time.perf_counter() - began)
        if step.total_num_scheduled_tokens == count and max(step.num_scheduled_tokens.values()) == 1:
            spent.append(took)
        answer(scheduler, step)
    scheduler.reset_prefix_cache()
    assert len(spent) >= STEPS // 2, f"{len(spent)} decode steps of all {count} requests"
    return spent


def answer(scheduler: Any, step: Any) -> None:
    """One token for each request whose prompt is in."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(step.num_scheduled_tokens)
    ready = [scheduler.requests[n].num_computed_tokens >= scheduler.requests[n].num_prompt_tokens for n in names]
    scheduler.update_from_output(
        step,
        ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[70] if done else [] for done in ready],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        ),
    )


def batch_and_layout(profile: Profile) -> dict[str, list[float]]:
    """Milliseconds of the worker's own bookkeeping at 256 requests."""
    import numpy as np
    import torch

    from eos_vllm.serving.batch import BatchState, StepEntry

    device, count, images = torch.device("cpu"), 256, 8
    plan = Planner(profile, BUDGET, block=32).plan(576 + TEXT, [ImageSpan(BEFORE, 576)])
    rows = [Entry(1, plan, 700) for _ in range(count - images)] + [Entry(576 + TEXT, plan, 0) for _ in range(images)]
    queries = profile.importance.queries
    state = BatchState(profile, count, device)
    state.allocate()
    requests, computed = [object() for _ in range(count)], np.full(count, 700)
    decodes = [StepEntry(str(i), plan, 700, 1) for i in range(count)]
    state.begin(decodes, requests)
    return {
        f"layout, {count} rows, {images} images, {len(profile.reducers)} reducers": timed(
            lambda: build_layout(rows, profile.num_segments, queries, device)
        ),
        f"batch, decode step that goes on, {count} requests": timed(lambda: state.goes_on(requests, computed, count)),
        f"batch, decode step of other requests, {count} requests": timed(lambda: state.begin(decodes, requests)),
    }


def timed(work: Callable[[], Any], times: int = 200) -> list[float]:
    """Milliseconds of each call."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(1000 * (time.perf_counter() - began))
    return spent


def summary(values: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high, "count": len(values), "values": [round(v, 4) for v in values]}


def table(result: dict[str, Any]) -> str:
    """Medians with quartiles, and eos over stock where there are both."""
    figures = result["milliseconds"]
    lines = ["| what | ms | over stock |", "| --- | --- | --- |"]
    for name, found in figures.items():
        stock = (
            figures.get(name.removesuffix("eos").removesuffix("selects before, ") + "stock")
            if name.endswith(", eos")
            else None
        )
        ratio = f"{found['median'] / stock['median']:.2f}" if stock else ""
        lines.append(f"| {name} | {common.shown(found['median'], found['low'], found['high'])} | {ratio} |")
    return "\n".join(lines) + f"\n\n{result['settings'].get('kv_groups')} KV groups."


if __name__ == "__main__":
    raise SystemExit(main())
