"""From a budget to counts: the rule of paper 2.6, schedules, floors, and what a user may type."""

import itertools
import math
import operator
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit_builders import make_profile

from eos_vllm.core.budget import cost_floor, eq11_counts, kept_counts, layer_average, parse_budget
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import Profile


@st.composite
def any_profile(draw: st.DrawFn, measure: str, least_discard: float = 0.0) -> Profile:
    depth = draw(st.integers(2, 34))
    layers = tuple(sorted(draw(st.sets(st.integers(0, depth - 2), min_size=1, max_size=5))))
    discards = tuple(draw(st.lists(st.floats(0, 0.95), min_size=len(layers), max_size=len(layers))))
    assume(max(discards) > least_discard)
    visual = draw(st.integers(1, 700))
    minimum = draw(st.integers(1, visual))
    return make_profile(layers, discards, depth, visual, measure, tokens=1, minimum=minimum)


@given(profile=any_profile("final", least_discard=1e-3), data=st.data())
def test_final_is_met_exactly(profile: Profile, data: st.DataObject) -> None:
    budget = data.draw(st.integers(profile.budget.minimum, profile.model.visual_tokens))
    counts = kept_counts(profile, budget)
    assert counts[-1] == budget
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= profile.model.visual_tokens


@given(profile=any_profile("final", least_discard=1e-3), data=st.data())
def test_a_larger_budget_keeps_no_fewer_anywhere(profile: Profile, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.integers(1, profile.model.visual_tokens)] * 2)))
    assert all(a <= b for a, b in zip(kept_counts(profile, low), kept_counts(profile, high), strict=True))


@given(profile=any_profile("layer_average", least_discard=1e-12), data=st.data())
def test_layer_average_is_met_to_within_rounding(profile: Profile, data: st.DataObject) -> None:
    floor, total = cost_floor(profile), profile.model.visual_tokens
    assume(math.floor(floor) + 1 <= total)
    budget = data.draw(st.integers(math.floor(floor) + 1, total))
    counts = kept_counts(profile, budget)
    # Each count is rounded by at most 1/2; the minimum alone may cost more than the budget.
    shares = itertools.accumulate((reducer.retain for reducer in profile.reducers), operator.mul)
    least = layer_average(profile, [total if share >= 1 else profile.budget.minimum for share in shares])
    assert layer_average(profile, counts) == pytest.approx(max(budget, least), abs=0.5 + 1e-6)
    assert list(counts) == sorted(counts, reverse=True)


def test_layer_average_is_solved_on_unrounded_counts() -> None:
    # One reducer after layer 1 of 4, 10 tokens: average 5 + c/2, so 7 asks for c = 4 and 8 for c = 6.
    profile = make_profile((1,), (0.3,), depth=4, visual=10, measure="layer_average", tokens=7)
    assert kept_counts(profile) == (4,)
    assert kept_counts(profile, 8) == (6,)
    # Two reducers of equal share s: 10/4 (1 + 1 + s + s²) = 7.5 asks for s + s² = 1, s = 0.618: 6.18 and 3.82.
    profile = make_profile((1, 2), (0.3, 0.3), depth=4, visual=100, measure="layer_average", tokens=75)
    assert kept_counts(profile) == (62, 38)


def test_final_follows_the_formula_of_the_design() -> None:
    profile = make_profile((1, 3), (0.5, 0.2), visual=576, tokens=64)
    t = math.log(64 / 576) / math.log(0.5 * 0.8)
    assert kept_counts(profile) == (math.floor(576 * 0.5**t + 0.5), 64)


def test_no_reducer_keeps_fewer_than_the_minimum() -> None:
    profile = make_profile((1, 3), (0.9, 0.9), visual=100, tokens=2, minimum=5)
    assert kept_counts(profile) == (14, 5)


@given(profile=any_profile("final"), more=st.integers(0, 1000), measure=st.sampled_from(["final", "layer_average"]))
def test_a_budget_of_all_tokens_or_more_means_no_reduction(profile: Profile, more: int, measure: str) -> None:
    total = profile.model.visual_tokens
    profile = profile.model_copy(update={"budget": profile.budget.model_copy(update={"measure": measure})})
    assert kept_counts(profile, total + more) == (total,) * len(profile.reducers)


def test_a_published_schedule_wins_and_is_taken_as_it_is() -> None:
    profile = make_profile((1, 3), (0.5, 0.5), tokens=10, schedules={"10": [90, 70], "200": [3, 2]}, minimum=20)
    assert kept_counts(profile) == (90, 70)
    assert kept_counts(profile, 200) == (3, 2)
    assert kept_counts(profile, 30) == (55, 30)


def test_below_the_floor_of_layer_average_is_refused_with_what_can_be_had() -> None:
    profile = make_profile((2, 6, 15), (0.9, 0.5, 0.4), depth=32, visual=576, measure="layer_average", tokens=64)
    assert cost_floor(profile) == 54
    with pytest.raises(BudgetError, match=r"eos_retain=54: .*cannot go below 54\.0.*give 55 to 576"):
        kept_counts(profile, 54)
    assert kept_counts(profile, 55)[-1] >= 1


def test_reducers_that_discard_nothing_do_not_lower_the_floor() -> None:
    profile = make_profile((0, 3), (0.0, 0.5), measure="layer_average", tokens=50)
    assert cost_floor(profile) == 50
    with pytest.raises(BudgetError, match=r"cannot go below 50\.0"):
        kept_counts(profile)
    assert kept_counts(profile, 60) == (100, 20)


def test_tiny_discards_reach_every_budget_too() -> None:
    profile = make_profile((1, 3), (1e-9, 1e-9), measure="layer_average", tokens=50)
    assert kept_counts(profile) == kept_counts(make_profile((1, 3), (0.5, 0.5), measure="layer_average", tokens=50))


@pytest.mark.parametrize("measure", ["final", "layer_average"])
def test_without_any_discard_only_all_tokens_can_be_had(measure: str) -> None:
    profile = make_profile((1, 3), (0.0, 0.0), measure=measure)
    with pytest.raises(BudgetError, match="no reducer of profile 'test' discards anything; give 100"):
        kept_counts(profile)
    assert kept_counts(profile, 100) == (100, 100)


@pytest.mark.parametrize("budget", [0, -1])
def test_budgets_below_1_are_refused(budget: int) -> None:
    with pytest.raises(BudgetError, match=f"eos_retain={budget}: .*give 1 to 100"):
        kept_counts(make_profile(), budget)


def test_equation_11_floors_each_step_and_is_not_fooled_by_binary_fractions() -> None:
    # (1 - 0.55) * 400 = 179.99999999999997 in binary, and means 180.
    assert eq11_counts(make_profile((1, 2), (0.55, 0.5), visual=400)) == (180, 90)
    assert eq11_counts(make_profile((1, 2, 3), (0.5, 0.5, 0.5), visual=101)) == (50, 25, 12)
    assert eq11_counts(make_profile((1, 2), (0.9, 0.9), visual=100, minimum=4)) == (10, 4)
    assert eq11_counts(make_profile((1,), (0.9,), visual=3, minimum=3)) == (3,)


@pytest.mark.parametrize(("value", "budget"), [(64, 64), ("64", 64), (" 64 ", 64), (64.0, 64), (1, 1), (10**9, 10**9)])
def test_budgets_that_are_understood(value: Any, budget: int) -> None:
    assert parse_budget(value) == budget


@pytest.mark.parametrize(
    "value",
    [None, True, [64], {"tokens": 64}, b"64", "", "many", "6.4", "64.0", 6.4, float("nan"), float("inf"), 0, -3, "-3"],
)
def test_budgets_that_are_not(value: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(value, "vllm_xargs.eos_retain")
    text = str(caught.value)
    assert text.startswith(f"vllm_xargs.eos_retain={value!r}: ")
    assert text.endswith(
        '; give a whole number of visual tokens per image, 1 or more, or a share such as 0.11 or "11%"'
    )
