"""Budgets as shares, and profiles for images of any size."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import profile_data, reducer

from eos_vllm.analysis.scaling import rescale
from eos_vllm.core.budget import Share, kept_counts, layer_average, parse_budget, plain
from eos_vllm.core.errors import BudgetError, ProfileError
from eos_vllm.core.plan import ImageSpan, Planner, rounded_count
from eos_vllm.core.profile import Profile, parse_profile

MODEL = {"architecture": "Qwen2_5_VLForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": None}
BEFORE = {**reducer(-1), "select": {"rule": "uniform"}}


def any_size(*reducers: dict[str, Any], share: float = 0.25, measure: str = "final", **changes: Any) -> Profile:
    return parse_profile(
        profile_data(
            schema="eos-profile/2",
            model=MODEL,
            reducers=list(reducers) or [reducer(1), reducer(3)],
            budget={"measure": measure, "share": share},
        )
        | changes
    )


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [("11%", Share(0.11)), (" 100% ", Share(1.0)), (0.11, Share(0.11)), ("0.5", Share(0.5)), ("2.5%", Share(0.025))],
)
def test_shares_are_read(given_value: Any, expected: Share) -> None:
    assert parse_budget(given_value) == expected


@given(st.floats(0.0001, 1.0) | st.integers(1, 20000))
def test_a_budget_survives_json(value: float) -> None:
    budget = Share(value) if isinstance(value, float) else value
    assert parse_budget(json.loads(json.dumps(plain(budget)))) == budget
    assert parse_budget(str(plain(budget))) == budget


def test_a_share_leaves_the_meaning_of_an_old_profile() -> None:
    old = parse_profile(profile_data())
    assert rescale(old, Share(0.1)).window == old.window == "prompt"


@pytest.mark.parametrize("value", [1, 1.0, "1"])
def test_one_is_a_token_and_no_share(value: Any) -> None:
    budget = parse_budget(value)
    assert (budget, type(budget)) == (1, int)


@pytest.mark.parametrize("value", ["0%", "101%", "-5%", "nan%", "%", "inf%", "0.0", -0.5, "x%"])
def test_shares_that_are_none(value: Any) -> None:
    with pytest.raises(BudgetError, match="eos_retain="):
        parse_budget(value)


@given(st.integers(1, 20000), st.floats(0.01, 0.99))
def test_counts_follow_from_each_image_by_one_rule(total: int, share: float) -> None:
    """Written out: rho^t with t = log(share) / log(rho1 rho2), rounded half up, at least 1, not increasing."""
    counts = kept_counts(any_size(), Share(share), total)
    power = math.log(share) / math.log(0.25)
    assert counts[1] == max(1, math.floor(total * 0.25**power + 0.5))
    assert counts[0] == max(counts[1], min(total, math.floor(total * 0.5**power + 0.5)))


@given(st.integers(1, 20000), st.integers(1, 25000))
def test_tokens_are_capped_by_the_image(total: int, tokens: int) -> None:
    counts = kept_counts(any_size(), tokens, total)
    assert counts == (total, total) if tokens >= total else counts[-1] == tokens


@given(st.integers(50, 20000), st.floats(0.35, 0.95))
def test_a_layer_average_is_met_by_images_of_any_size(total: int, share: float) -> None:
    profile = any_size(measure="layer_average", share=0.5)
    counts = kept_counts(profile, Share(share), total)
    assert abs(layer_average(profile, counts, total) - share * total) <= 1


def test_a_share_below_the_floor_is_refused_for_all_images_alike() -> None:
    profile = any_size(measure="layer_average", share=0.5)
    for total in (7, 100, 12345):
        with pytest.raises(BudgetError, match=r"eos_retain='20%'.*cannot go below"):
            kept_counts(profile, Share(0.2), total)


@given(st.integers(1, 4000), st.integers(0, 40), st.floats(0.05, 0.95), st.sampled_from([1, 16, 32]))
def test_a_plan_keeps_text_within_images_and_removes_whole_blocks(
    visual: int, ends: int, share: float, block: int
) -> None:
    planner = Planner(any_size(), Share(share), block, image_token=7)
    row = visual // ends if ends else visual + 1
    image = ([7] * row + [3]) * ends + [7] * (visual - row * ends if ends else visual)
    prompt = [1, *image, 2, 2]
    plan = planner.plan(prompt, [ImageSpan(1, len(image))])
    text = len(image) - visual
    assert plan.spans[0].visual == visual
    wanted = kept_counts(planner.profile, Share(share), visual)
    assert plan.kept[0] == (len(image), *(rounded_count(len(image), count + text, block, text) for count in wanted))
    assert all(left > text for left in plan.kept[0])
    assert all((len(image) - left) % block == 0 for left in plan.kept[0])


@given(st.integers(2, 4000), st.floats(0.05, 0.95))
def test_behind_a_selection_counts_follow_from_what_it_left(total: int, share: float) -> None:
    """As if the image's own number were known there, but for rounding."""
    profile = any_size(BEFORE, reducer(2), reducer(4), share=share)
    planner = Planner(profile, block=1)
    selected = planner.image_tokens(None, total)
    direct, behind = kept_counts(profile, Share(share), total), planner.counts(None, total)
    assert behind[0] == selected == direct[0]
    assert all(abs(a - b) <= 1 for a, b in zip(direct[1:], behind[1:], strict=True))


def test_behind_a_selection_tokens_are_refused() -> None:
    planner = Planner(any_size(BEFORE, reducer(2)), block=1)
    with pytest.raises(BudgetError, match="give a share"):
        planner.counts(64, 1000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"measure": "final", "share": 0.2, "tokens": 5}}, "either tokens or share"),
        ({"budget": {"measure": "final", "share": 0.0}}, "greater than 0"),
        ({"schedules": {"64": [70, 64]}}, "schedules: counts need model.visual_tokens"),
        ({"importance": {"debias": [1.0]}}, "importance.debias: its places need model.visual_tokens"),
        ({"schema": "eos-profile/1"}, "needs schema eos-profile/2"),
        ({"reducers": [BEFORE, reducer(2)], "budget": {"measure": "final", "tokens": 5}}, "need budget.share"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        any_size(**changes)


def test_a_share_means_the_same_on_images_of_fixed_size() -> None:
    fixed = parse_profile(profile_data(schema="eos-profile/2"))
    assert kept_counts(fixed, Share(0.1)) == kept_counts(fixed, 10)
    assert kept_counts(fixed, Share(1.0)) == (100, 100, 100)
