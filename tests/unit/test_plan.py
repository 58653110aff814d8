"""The plan of a request: how many tokens each segment holds, and which text an image is asked about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import Prompt, make_profile, prompts

from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan

PROFILE = make_profile((0, 2, 3), (0.4, 0.3, 0.5), visual=8, tokens=2)


def planned(prompt: Prompt, budget: int) -> RequestPlan:
    return Planner(PROFILE).plan(prompt.length, prompt.spans, budget)


def kinds(prompt: Prompt) -> list[int | None]:
    """For each token of the prompt the image that it belongs to, or None for text."""
    result: list[int | None] = [None] * prompt.front
    for i, (image, text) in enumerate(prompt.images):
        result += [i] * image + [None] * text
    return result


@given(prompt=prompts(10, with_images=True), budget=st.integers(1, 7))
def test_segment_length_is_what_is_left_when_each_image_keeps_its_count(prompt: Prompt, budget: int) -> None:
    plan, of = planned(prompt, budget), kinds(prompt)
    counts = (10**9, *Planner(PROFILE).counts(budget))
    assert plan.num_segments == 4
    for segment, count in enumerate(counts):
        for num_tokens in range(prompt.length + 3):
            seen = of[:num_tokens] + [None] * (num_tokens - len(of))
            text = seen.count(None)
            images = [min(seen.count(i), count) for i in range(len(prompt.images))]
            assert plan.segment_length(segment, num_tokens) == text + sum(images)


@given(prompt=prompts(10, with_images=True), budget=st.integers(1, 7))
def test_segment_length_rises_with_tokens_and_falls_with_segments(prompt: Prompt, budget: int) -> None:
    plan = planned(prompt, budget)
    table = [[plan.segment_length(s, n) for n in range(prompt.length + 3)] for s in range(4)]
    assert all(row == sorted(row) for row in table)
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*table, strict=True))
    # Behind the prompt each generated token counts in every segment.
    assert all(row[-1] - row[-2] == 1 for row in table)


@given(prompt=prompts(10, with_images=True), budget=st.integers(1, 7))
def test_removed_is_the_sum_over_images_and_what_whole_prompts_lack(prompt: Prompt, budget: int) -> None:
    plan = planned(prompt, budget)
    counts = Planner(PROFILE).counts(budget)
    lost = [sum(max(0, image - count) for image, _ in prompt.images) for count in counts]
    assert plan.removed == (0, *lost)
    assert [prompt.length - plan.segment_length(s, prompt.length) for s in range(4)] == [0, *lost]
    assert plan.reduces == (lost[-1] > 0)


@given(prompt=prompts(10, with_images=True), budget=st.integers(1, 7))
def test_segment_start_is_where_an_image_stands_among_what_is_left(prompt: Prompt, budget: int) -> None:
    plan = planned(prompt, budget)
    for image, span in enumerate(prompt.spans):
        for segment in range(4):
            assert plan.segment_start(image, segment) == plan.segment_length(segment, span.start)


@given(prompt=prompts(10, with_images=True))
def test_query_positions_are_the_text_behind_the_image_or_else_the_last_token(prompt: Prompt) -> None:
    plan, of = planned(prompt, 2), kinds(prompt)
    for image, span in enumerate(prompt.spans):
        behind = [p for p in range(span.end, prompt.length) if of[p] is None]
        assert plan.query_positions(image) == (tuple(behind) or (prompt.length - 1,))
    assert plan.last_token_is_visual == (of[-1] is not None)
    assert plan.images_end == max(p for p, i in enumerate(of) if i is not None) + 1


def test_spans_are_sorted() -> None:
    planner = Planner(PROFILE)
    spans = [ImageSpan(12, 8), ImageSpan(2, 6)]
    assert planner.plan(25, spans) == planner.plan(25, spans[::-1])
    assert planner.plan(25, spans).spans == (ImageSpan(2, 6), ImageSpan(12, 8))


@pytest.mark.parametrize(
    "spans",
    [
        [ImageSpan(0, 8), ImageSpan(7, 8)],
        [ImageSpan(5, 8), ImageSpan(5, 8)],
        [ImageSpan(13, 8)],
        [ImageSpan(-1, 8)],
        [ImageSpan(0, 8), ImageSpan(20, 1)],
    ],
)
def test_spans_that_overlap_or_leave_the_prompt_are_refused(spans: list[ImageSpan]) -> None:
    with pytest.raises(ValueError, match="overlap or leave the prompt of 20 tokens"):
        Planner(PROFILE).plan(20, spans)
    Planner(PROFILE).plan(20, [ImageSpan(0, 8), ImageSpan(8, 12)])


def test_text_alone_is_planned_as_nothing_and_needs_no_valid_budget() -> None:
    plan = Planner(PROFILE).plan(20, [], budget=0)
    assert (plan.reduces, plan.removed, plan.num_segments, plan.images_end) == (False, (), 1, 0)
    assert [plan.segment_length(s, 20) for s in range(4)] == [20] * 4
    assert not plan.last_token_is_visual


def test_a_requests_budget_comes_before_the_servers_and_that_before_the_profiles() -> None:
    spans = [ImageSpan(0, 8)]
    assert Planner(PROFILE).plan(9, spans).kept[0][-1] == 2
    assert Planner(PROFILE, budget=5).plan(9, spans).kept[0][-1] == 5
    assert Planner(PROFILE, budget=5).plan(9, spans, budget=3).kept[0][-1] == 3
    assert not Planner(PROFILE, budget=5).plan(9, spans, budget=8).reduces
    with pytest.raises(BudgetError):
        Planner(PROFILE).plan(9, spans, budget=0)


def test_remembered_counts_are_the_right_ones_however_many_budgets_were_asked_for() -> None:
    planner, fresh = Planner(PROFILE), lambda budget: Planner(PROFILE).counts(budget)
    for budget in [*range(1, 5000), 3, 1]:
        counts = planner.counts(budget)
        if budget < 20:
            assert counts == fresh(budget)
