"""A reducer before the decoder, alone and with reducers inside: vLLM against the Hugging Face reference, in float32.

``visprune`` and ``coverage`` are not among them: the order of one round decides the next, or gains differ in the sixth
digit, so that the last bit of a tower's output can decide. On equal outputs both are exact (``test_selectors.py``).
"""

from typing import Any

import pytest
import torch

from eos_search.reference import ReferenceModel
from eos_search.tower import tower_output
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.images import sample_image
from eos_vllm.serving.image_processor import fingerprint
from support.engines import Ask, BlockWatch, answer_all, engine, free_blocks, mixed_asks, scheduler_of

LOGPROB_BOUND = 1e-4
_VALUES = {"gate": 1.0, "tau": 0.1, "theta": 0.0, "rho": 0.0, "nu": 0.0}


def make(
    select: dict[str, Any] | None, inside: tuple[int, ...] = (), withdraw: int | None = None, **more: Any
) -> Profile:
    """A profile for the small model with a reducer before it."""
    first = {"layer": -1, **({"select": select} if select else {}), **_VALUES, "gamma": 0.0, "discard": 0.8}
    first |= more.pop("first", {})
    reducers = [first, *({"layer": layer, **_VALUES, "gamma": 0.2, "discard": 0.5} for layer in inside)]
    reducers += [] if withdraw is None else [{"layer": withdraw, "withdraw": True}]
    return parse_profile(
        {
            "schema": "eos-profile/2",
            "name": "before",
            "model": {
                "architecture": "LlavaForConditionalGeneration",
                "num_decoder_layers": 8,
                "visual_tokens": 576,
            },
            "importance": {"queries": "all_text", "window": "prompt"},
            "reducers": reducers,
            "budget": {"measure": "final", "tokens": 64},
            **more,
        }
    )


ALONE = {
    "maxmin": make(None),
    "visionzip": make({"rule": "visionzip"}),
    "topk-transfer": make(
        {"rule": "topk", "score": "received_attention"}, first={"gamma": 0.25, "rho": 0.4, "nu": 0.5}
    ),
    "window_topk-mean": make(
        {"rule": "window_topk", "shallow_layer": 0},
        # Not one-hot: which anchor is nearest would be decided by the last bit of two towers.
        first={"gamma": 1.0, "tau": 0.05, "theta": -1.0},
        operator={"gate_sharpness": 1e6, "aggregate": "mean"},
    ),
    "resize": make({"rule": "resize"}),
    "prumerge_plus": make({"rule": "prumerge_plus"}),
}
INSIDE = {
    "topk-one-inside": make({"rule": "topk"}, inside=(3,)),
    "mmr-two-inside-withdrawn": make(
        {"rule": "mmr", "score": "rarity"}, inside=(2, 4), withdraw=6, importance={"queries": "relevant_text"}
    ),
    "topk-withdrawn": make({"rule": "topk"}, withdraw=5, budget={"measure": "layer_average", "tokens": 96}),
}


def asks_for(profile: Profile) -> list[Ask]:
    """The mixed requests: 0, 1 and 2 images, other budgets, several of one image; those that the profile can reach."""
    asks = mixed_asks()
    for ask in asks:
        if profile.budget.measure == "layer_average" and ask.budget is not None and ask.budget < 64:
            ask.budget = 128
    return asks


def hold_choices(llm: Any, asks: list[Ask], reference: ReferenceModel) -> int:
    """The worker chose the very patches that the reference chooses; gives the number of images compared."""
    profile, worker = reference.planner.profile, llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    compared = 0
    for ask in asks:
        keep = reference.planner.image_tokens(ask.budget)
        for image in ask.images:
            pixels = reference.processor.image_processor([image], return_tensors="pt")["pixel_values"]
            chosen = worker.eos_before.choices.get((fingerprint(pixels[0]), keep))
            if chosen is None:  # not reduced, or a rule that keeps no patches as they are
                continue
            seen = tower_output(reference.model, pixels, profile.selector)
            assert torch.equal(profile.selector.choose(seen, keep).kept[0], chosen)
            compared += 1
    return compared


def hold(asks: list[Ask], answers: list[Any], reference: ReferenceModel) -> None:
    """Each answer is the reference's, token by token."""
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        want = reference.generate(ask.prompt, ask.images, ask.max_tokens, ask.budget)
        assert answer.token_ids == want.token_ids, f"request {i}"
        for token, logprob in answer.first_logprobs.items():
            assert abs(logprob - float(want.logprobs[0, token])) <= LOGPROB_BOUND, f"request {i}"


@pytest.mark.parametrize("name", ALONE)
def test_alone_it_is_the_reference_on_stock_machinery(name: str, tiny_model: Any) -> None:
    profile = ALONE[name]
    asks = asks_for(profile)
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile)
    with engine(tiny_model, profile, enable_prefix_caching=True, max_num_batched_tokens=512) as llm:
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        free = free_blocks(llm)
        answers, again = answer_all(llm, asks), answer_all(llm, asks)
        assert free_blocks(llm) == free
        compared = hold_choices(llm, asks, reference)
        report = llm.collective_rpc("eos_report")[0]
    assert len(groups) == 1
    hold(asks, answers, reference)
    assert compared > 0 or profile.selector.mixes or profile.selector.rule == "resize"
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]
    assert 0 < report["tokens_kept"][0] < report["tokens_in"][0]


def test_adjacent_images_that_ask_themselves_and_are_withdrawn(tiny_model: Any) -> None:
    """No step may end such that the layers behind the withdrawal see no token of a request."""
    profile = make({"rule": "topk"}, withdraw=4, importance={"queries": "image"})
    asks = [
        Ask("USER: <image><image><image>\nWhat? ASSISTANT:", [sample_image(800 + 3 * i + j) for j in range(3)], 64)
        for i in range(3)
    ]
    asks += [Ask(f"USER: Number {i}? ASSISTANT:") for i in range(3)]
    asks += [Ask("USER: <image>", [sample_image(820)], 64), Ask("USER: <image><image>", [sample_image(821)] * 2, 64)]
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32)
    small = {"max_num_batched_tokens": 240, "limit_mm_per_prompt": {"image": 3}}
    with engine(tiny_model, profile, **small) as llm:
        free = free_blocks(llm)
        with BlockWatch(scheduler_of(llm)) as watch:
            answers, again = answer_all(llm, asks), answer_all(llm, asks)
        assert free_blocks(llm) == free
    assert not watch.errors
    hold(asks, answers, reference)
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]


@pytest.mark.parametrize("name", INSIDE)
def test_with_reducers_inside(name: str, tiny_model: Any) -> None:
    profile = INSIDE[name]
    asks = asks_for(profile)
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32)
    with engine(tiny_model, profile) as llm:
        free = free_blocks(llm)
        with BlockWatch(scheduler_of(llm)) as watch:
            answers, again = answer_all(llm, asks), answer_all(llm, asks)
        assert free_blocks(llm) == free
        report, counters = llm.collective_rpc("eos_report")[0], scheduler_of(llm).counters
        assert report["tokens_kept"][1:] == counters.tokens_kept[1:]
        assert hold_choices(llm, asks, reference) > 0
    assert not watch.errors
    assert watch.reduced > 500
    hold(asks, answers, reference)
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]
