"""Chats, shared images and chunks, token by token: against the reference, and against an engine without a cache."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eos_search.reference import ReferenceModel
from eos_vllm.core.profile import Profile
from eos_vllm.models.images import sample_image
from support.engines import (
    Ask,
    BlockWatch,
    answer_all,
    engine,
    free_blocks,
    marker_of,
    params_of,
    prompt_of,
    scheduler_of,
)
from support.profiles import make_profile

VALUES = {"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
PROFILES: dict[str, Profile] = {
    "turn-relevant": make_profile(schema="eos-profile/2", operator_values=VALUES),
    "turn-all-average": make_profile(
        layers=(0, 2),
        schema="eos-profile/2",
        importance={"queries": "all_text", "window": "turn"},
        budget={"measure": "layer_average", "tokens": 200},
    ),
    "image": make_profile(
        layers=(1, 4, 6), schema="eos-profile/2", operator_values=VALUES, importance={"queries": "image"}
    ),
    "prompt-last": make_profile(layers=(2,), importance={"queries": "last_text"}),
}
LOGPROB_BOUND = 1e-4
FIRST, SECOND, THIRD = "What is in it?", "Which colour has it?", "And how many are there?"


def turns(*texts: str, image: str = "<image>\n") -> str:
    """A chat as the template writes it: questions and answers in turn, the first with an image."""
    parts = []
    for i, text in enumerate(texts):
        parts.append(f"USER: {image if i == 0 else ''}{text} " if i % 2 == 0 else f"ASSISTANT: {text} ")
    return "".join(parts) + "ASSISTANT:"


@pytest.fixture(scope="module", params=list(PROFILES))
def served(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[tuple[Any, ReferenceModel, str]]:
    """One engine with a small step, so that prompts come in chunks, and the reference for each profile."""
    profile = PROFILES[request.param]
    with engine(tiny_model, profile, max_num_batched_tokens=1400) as llm:
        reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32, marker=marker_of(llm))
        yield llm, reference, request.param


def compare(llm: Any, reference: ReferenceModel, asks: list[Ask], hits: list[list[int]] | None = None) -> list[Any]:
    """Answers of the engine in one batch, held against the reference; blocks against the plan.

    Tokens found in the cache, by KV group, go to ``hits``.
    """
    with BlockWatch(scheduler_of(llm)) as watch:
        answers = answer_all(llm, asks)
    assert watch.errors == []
    if hits is not None:
        hits.extend(watch.hit_tokens)
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        want = reference.generate(ask.prompt, ask.images, ask.max_tokens, ask.budget)
        assert answer.token_ids == want.token_ids, f"request {i}"
        for token, logprob in answer.first_logprobs.items():
            assert abs(logprob - float(want.logprobs[0, token])) <= LOGPROB_BOUND, f"request {i}"
    return answers


def encoded(llm: Any) -> int:
    """Images that the worker has reduced since start."""
    return int(llm.collective_rpc("eos_report")[0]["images"])


@contextmanager
def tower_calls(llm: Any) -> Iterator[list[int]]:
    """One entry for each call of the vision tower within the block."""
    calls: list[int] = []
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    handle = runner.get_model().vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_three_turns_of_two_chats(served: Any) -> None:
    llm, reference, name = served
    assert llm.reset_prefix_cache()
    budget = 576 if name == "turn-all-average" else 128
    pictures = [[sample_image(300)], [sample_image(301)]]
    first: list[Any] = []
    chats = [[FIRST, "Red.", SECOND, "Two.", THIRD], [SECOND, "Blue and", FIRST, "A cat", THIRD]]
    for turn in (1, 3, 5):
        before = encoded(llm)
        asks = [
            Ask(turns(*chat[:turn]), picture, None if chat is chats[0] else budget, max_tokens=8)
            for chat, picture in zip(chats, pictures, strict=True)
        ]
        hits: list[list[int]] = []
        with tower_calls(llm) as calls:
            answers = compare(llm, reference, asks, hits)
        first = first or answers
        if name != "prompt-last":
            assert bool(calls) == (turn == 1)
        if turn > 1 and name != "prompt-last":
            for answer, start in zip(answers, first, strict=True):
                # Image and first question at least, or whole blocks of them where nothing is reduced.
                assert answer.cached_tokens >= start.prompt_tokens // 32 * 32
                assert answer.prompt_tokens - answer.cached_tokens < 100
            assert encoded(llm) == before
            # By KV group: a segment behind a reducer finds as many tokens fewer as the chat's plan removes there.
            assert len(hits) == len(answers)
            groups = [m.kv_cache_spec.segment for m in scheduler_of(llm).coordinator.single_type_managers]
            planner = reference.planner
            assert planner is not None
            for answer, ask, tokens in zip(answers, asks, hits, strict=True):
                gone = [0, *(576 - count for count in planner.counts(ask.budget))]
                assert tokens == [answer.cached_tokens - gone[segment] for segment in groups]
        elif turn > 1:  # all later text asks: what was kept for an earlier turn is another choice
            assert all(answer.cached_tokens < 100 for answer in answers)


def test_other_questions_and_budgets_on_one_image(served: Any) -> None:
    llm, reference, name = served
    picture = [sample_image(310)]
    budgets = [None, 300, 576] if name == "turn-all-average" else [None, 32, 128, 160, 576]
    asks = [Ask(turns(FIRST), picture, budget, max_tokens=6) for budget in budgets]
    for ask in asks:
        compare(llm, reference, [ask])
    again = compare(llm, reference, asks)  # in one batch, each of its own budget, all known
    for answer in again:
        assert answer.prompt_tokens - answer.cached_tokens < 64
    others = compare(llm, reference, [Ask(turns(text), picture, max_tokens=6) for text in (SECOND, THIRD)])
    if name == "image":  # what is kept does not depend on the question
        assert all(answer.prompt_tokens - answer.cached_tokens < 64 for answer in others)


def test_images_in_several_turns_and_places(served: Any) -> None:
    llm, reference, _ = served
    one, two = sample_image(320), sample_image(321)
    chat = turns(FIRST, "Red.") + " x USER: <image>\nAnd this? ASSISTANT:"
    asks = [
        Ask(turns(FIRST), [one], max_tokens=6),
        Ask(chat, [one, two], max_tokens=6),
        Ask("USER: <image>\nand <image>\nSame? ASSISTANT:", [one, two], max_tokens=6),
        Ask("USER: <image>\nand <image>\nSame? ASSISTANT: No USER: Why? ASSISTANT:", [one, two], max_tokens=6),
        Ask("USER: look <image>", [one], max_tokens=6),
        Ask("<image>what is it", [two], max_tokens=6),
        Ask("USER: no image at all ASSISTANT:", max_tokens=6),
    ]
    for ask in asks:
        compare(llm, reference, [ask])
    compare(llm, reference, asks)


def test_long_text_comes_in_chunks(served: Any) -> None:
    llm, reference, name = served
    long = "What is it, and why is it so? " * (20 if name == "prompt-last" else 40)
    asks = [
        Ask(f"USER: {long} <image>\n{FIRST} ASSISTANT: Red. USER: {SECOND} ASSISTANT:", [sample_image(330)]),
        Ask(turns(FIRST), [sample_image(331)]),
        Ask(f"USER: {long} ASSISTANT:"),
    ]
    for ask in asks:
        ask.max_tokens = 8
    compare(llm, reference, asks)
    warm = compare(llm, reference, asks)
    assert sum(a.prompt_tokens - a.cached_tokens for a in warm) < 120


def test_what_no_step_can_hold_is_refused(served: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm, reference, name = served
    text = "What is it, and why is it so? " * 20
    ask = Ask(f"USER: <image>\nand <image>\n{text} ASSISTANT:", [sample_image(340), sample_image(341)], max_tokens=4)
    if name == "image":  # nothing but the image asks
        compare(llm, reference, [ask])
    else:
        with pytest.raises(VLLMValidationError, match="a step holds 1400"):
            answer_all(llm, [ask])
    compare(llm, reference, [Ask(turns(FIRST), [sample_image(340)], max_tokens=4)])


def test_nothing_is_left_behind(served: Any) -> None:
    llm, _, _ = served
    scheduler = scheduler_of(llm)
    assert not scheduler.plans
    assert not scheduler.keys
    assert not scheduler.coordinator._room
    assert not scheduler.coordinator._next_to_cache
    assert all(not m._fresh_marks and not m._marked for m in scheduler.coordinator.single_type_managers)
    pool = scheduler.kv_cache_manager.block_pool
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    assert llm.reset_prefix_cache()
    assert len(pool.cached_block_hash_to_block) == 0


def random_asks(choose: random.Random, count: int) -> list[Ask]:
    """Chats over few images, so that they share prefixes of all kinds."""
    asks = []
    words = [FIRST, SECOND, THIRD, "Why?", "Tell me more about this, please, and say how it is."]
    for _ in range(count):
        length = choose.choice([1, 1, 3, 5])
        chat = [choose.choice(words) for _ in range(length)]
        images, text = [sample_image(400 + choose.randrange(3))], turns(*chat)
        if choose.random() < 0.25:
            text = text + f" Yes USER: <image>\n{choose.choice(words)} ASSISTANT:"
            images = [*images, sample_image(400 + choose.randrange(3))]
        if choose.random() < 0.2:
            text = "SYSTEM: " + "be brief and exact. " * choose.randrange(1, 40) + text
        asks.append(Ask(text, images, choose.choice([None, 32, 128, 576]), max_tokens=choose.randrange(2, 12)))
    return asks


def run_randomly(llm: Any, asks: list[Ask], choose: random.Random) -> tuple[list[list[int]], int]:
    """Tokens of each request; they arrive at any time, and running ones are preempted at any time."""
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    waiting, got, forced = list(enumerate(asks)), {}, 0
    with BlockWatch(scheduler) as watch:
        while waiting or core.has_unfinished_requests():
            while waiting and (choose.random() < 0.6 or not core.has_unfinished_requests()):
                index, ask = waiting.pop(0)
                core.add_request(str(index), prompt_of(ask), params_of(ask))
            if scheduler.running and choose.random() < 0.15:
                victim = scheduler.running.pop(choose.randrange(len(scheduler.running)))
                scheduler._preempt_request(victim, 0.0)
                forced += 1
            for output in core.step():
                if output.finished:
                    got[int(output.request_id)] = list(output.outputs[0].token_ids)
    assert watch.errors == []
    return [got[i] for i in range(len(asks))], forced


# STRESS_SEEDS=1,2,3 asks others than these two.
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("STRESS_SEEDS", "0,2").split(",")])
def test_stress_equals_the_engine_without_a_cache(seed: int, tiny_model: Path) -> None:
    choose = random.Random(seed)
    asks = random_asks(choose, 30)
    profile = PROFILES["turn-relevant"]
    with engine(tiny_model, profile, enable_prefix_caching=False, limit_mm_per_prompt={"image": 2}) as llm:
        want = [answer.token_ids for answer in answer_all(llm, asks)]
    with engine(tiny_model, profile, max_num_batched_tokens=1400, num_gpu_blocks_override=320) as llm:
        free = free_blocks(llm)
        got, forced = run_randomly(llm, asks, choose)
        assert free_blocks(llm) == free
    assert forced > 3
    assert got == want
