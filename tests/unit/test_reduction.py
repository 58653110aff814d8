"""Reducers on ragged batches: equal to each request alone, and to a reference of plain loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduction_cases import RULES, SCALE, Outcome, Request, make_request, profile_of, run_batched, run_reference
from unit_builders import Prompt, batches, make_profile

from eos_vllm.core import reduction
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import build_layout
from eos_vllm.core.plan import Planner
from eos_vllm.core.reduction import image_query_weights, reduce_tokens


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert got[0] == expected[0]
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def requests_of(prompts: list[Prompt], budgets: list[int], seed: int) -> list[Request]:
    return [make_request(p, budgets[i % len(budgets)], seed + i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60)
@given(prompts=batches(8), budgets=st.lists(st.integers(1, 8), min_size=1, max_size=3), seed=st.integers(0, 2**20))
def test_a_batch_equals_the_reference(rule: str, prompts: list[Prompt], budgets: list[int], seed: int) -> None:
    profile = profile_of(rule)
    requests = requests_of(prompts, budgets, seed)
    for got, request in zip(run_batched(requests, profile), requests, strict=True):
        assert_same(got, run_reference(request, profile))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60)
@given(
    prompts=batches(11),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    budgets=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_text_within_images_stays_and_asks_nothing(
    rule: str, prompts: list[Prompt], widths: list[int], budgets: list[int], seed: int
) -> None:
    profile = profile_of(rule)
    prompts = [replace(prompt, width=widths[i % len(widths)]) for i, prompt in enumerate(prompts)]
    requests = requests_of(prompts, budgets, seed)
    for got, request in zip(run_batched(requests, profile), requests, strict=True):
        assert_same(got, run_reference(request, profile))


@pytest.mark.parametrize("norm", ["token", "frobenius"])
@settings(max_examples=40)
@given(prompts=batches(8), budgets=st.lists(st.integers(1, 8), min_size=1, max_size=3), seed=st.integers(0, 2**20))
def test_a_batch_equals_its_requests_one_by_one(norm: str, prompts: list[Prompt], budgets: Any, seed: int) -> None:
    profile = profile_of("relevant_text", norm)
    requests = requests_of(prompts, budgets, seed)
    for got, request in zip(run_batched(requests, profile), requests, strict=True):
        if request.prompt.images:
            assert_same(got, run_batched([request], profile)[0])


@settings(max_examples=40)
@given(prompts=batches(8), budget=st.integers(1, 8), seed=st.integers(0, 2**20))
def test_order_is_kept_text_stays_and_counts_are_met(prompts: list[Prompt], budget: int, seed: int) -> None:
    profile = profile_of("relevant_text")
    counts = Planner(profile).counts(budget)
    requests = requests_of(prompts, [budget], seed)
    for (left, _), prompt in zip(run_batched(requests, profile), prompts, strict=True):
        visual = {p for span in prompt.spans for p in range(span.start, span.end)}
        before = list(range(prompt.length + prompt.generated))
        for positions, count in zip(left, counts, strict=True):
            assert positions == sorted(positions)
            assert set(positions) <= set(before)
            assert [p for p in positions if p not in visual] == [p for p in before if p not in visual]
            for span in prompt.spans:
                of_image = [p for p in positions if span.start <= p < span.end]
                assert len(of_image) == min(count, span.length)
            before = positions


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30)
@given(images=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_a_prompt_that_ends_in_an_image_keeps_its_last_token(rule: str, images: int, seed: int) -> None:
    prompt = Prompt(1, ((8, 1),) * (images - 1) + ((8, 0),))
    left, _ = run_batched([make_request(prompt, 1, seed)], profile_of(rule))[0]
    assert all(positions[-1] == prompt.length - 1 for positions in left)
    # Only the last image's; of the others each keeps its own best.
    assert len(left[-1]) == 1 + (images - 1) * 2 + 1


def test_the_last_token_stays_although_its_score_is_the_lowest() -> None:
    request = make_request(Prompt(1, ((8, 0),)), 1, seed=0)
    request.key[:, -1] = -50 * request.query[:, -1, ::2]
    for rule in RULES:
        left, _ = run_batched([request], profile_of(rule))[0]
        assert left[-1] == [0, 8]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30)
@given(images=st.lists(st.tuples(st.just(8), st.integers(0, 3)), min_size=1, max_size=2), seed=st.integers(0, 2**20))
def test_generated_tokens_do_not_change_the_choice(rule: str, images: Any, seed: int) -> None:
    # A preempted request is recomputed together with what it had generated.
    profile, prompt = profile_of(rule), Prompt(1, tuple(images))
    longer = make_request(Prompt(1, tuple(images), generated=4), 3, seed)
    first = Request(
        prompt,
        3,
        longer.embeddings[: prompt.length],
        *(values[:, : prompt.length] for values in (longer.added, longer.query, longer.key)),
    )
    left, hidden = run_batched([first], profile)[0]
    again, hidden_again = run_batched([longer], profile)[0]
    tail = list(range(prompt.length, prompt.length + 4))
    assert again == [positions + tail for positions in left]
    torch.testing.assert_close(hidden_again[:-4], hidden)


def test_the_choice_follows_the_attention_and_the_rule() -> None:
    # Image at 1..8, text at 9 and 10. Token 9 looks at position 3 alone, token 10 at 6 (62 %) and at 3 (38 %).
    request = make_request(Prompt(1, ((8, 2),)), 1, seed=1)
    request.query.zero_()
    request.key.zero_()
    request.key[:, 3, :, 0] = request.key[:, 6, :, 1] = 10.0
    request.query[:, 9:, :, 0] = 10.0
    request.query[:, 10, :, 1] = 10.1

    def kept(rule: str) -> int:
        return run_batched([request], profile_of(rule))[0][0][-1][1]

    assert (kept("last_text"), kept("all_text")) == (6, 3)
    # The image resembles either token, so that relevant_text asks that one alone.
    for resembled, expected in ((9, 3), (10, 6)):
        request.embeddings.zero_()
        request.embeddings[1:9, 0] = request.embeddings[resembled, 0] = 5.0
        assert kept("relevant_text") == expected


def test_scores_of_ranks_are_joined_before_the_choice() -> None:
    request = make_request(Prompt(1, ((8, 2),)), 3, seed=2)
    profile = make_profile((0,), (0.5,), visual=8, tokens=3)
    row = request.prompt.row(Planner(profile), 3)
    layout = build_layout([row], 2, "all_text", torch.device("cpu"))
    weights = image_query_weights("all_text", request.embeddings, layout)
    arguments = (request.embeddings, request.query[0], request.key[0], layout.steps[0], weights)
    seen: list[torch.Tensor] = []

    def join(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return -scores

    _, source = reduce_tokens(*arguments, profile.operator_params(0), SCALE, ScoreOptions(join=join))
    assert source.tolist() == [0, *(1 + i for i in sorted(seen[0][0].argsort()[:3].tolist())), 9, 10]


def test_half_precision_hidden_states_keep_their_type_and_text_its_bits() -> None:
    request = make_request(Prompt(1, ((8, 2),)), 3, seed=3)
    profile = profile_of("all_text")
    layout = build_layout([request.prompt.row(Planner(profile), 3)], 4, "all_text", torch.device("cpu"))
    hidden = request.embeddings.half()
    weights = image_query_weights("all_text", hidden, layout)
    query, key = request.query[0].half(), request.key[0].half()
    out, source = reduce_tokens(hidden, query, key, layout.steps[0], weights, profile.operator_params(0), SCALE)
    assert out.dtype == torch.float16
    text = [j for j, row in enumerate(source.tolist()) if row in (0, 9, 10)]
    assert torch.equal(out[text], hidden[[0, 9, 10]])


def test_scoring_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(1, ((8, 2),)), Prompt(3, ((8, 1), (8, 3))), Prompt(0, ((8, 2),))]
    requests = requests_of(prompts, [2], seed=4)
    whole = run_batched(requests, profile_of("all_text"))
    monkeypatch.setattr(reduction, "_SCORE_ELEMENTS", 1)
    for got, expected in zip(run_batched(requests, profile_of("all_text")), whole, strict=True):
        assert_same(got, expected)
