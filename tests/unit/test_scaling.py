"""One profile for another budget or another model."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit_builders import make_profile

from eos_vllm.analysis.scaling import rescale, scale_layers, scale_to_model
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import BudgetError, ProfileError


@given(budget=st.integers(1, 120), measure=st.sampled_from(["final", "layer_average"]))
def test_rescaling_writes_down_the_counts_and_changes_nothing_else(budget: int, measure: str) -> None:
    profile = make_profile(measure=measure, tokens=60, schedules={"7": [9, 8, 6]}, provenance={"seed": 42})
    assume(measure == "final" or budget > 25 or budget == 7)
    counts = kept_counts(profile, budget)
    new = rescale(profile, budget)
    assert new.budget.tokens == budget
    assert kept_counts(new) == new.schedules[str(budget)] == counts
    assert new.schedules["7"] == (9, 8, 6)
    assert (new.reducers, new.model, new.operator, new.name) == (
        profile.reducers,
        profile.model,
        profile.operator,
        profile.name,
    )
    assert new.provenance == {"seed": 42, "rescaled": {"name": "test", "budget": 60}}
    # Other budgets come out as they did.
    assert kept_counts(new, 50) == kept_counts(profile, 50)


def test_rescaling_below_the_floor_is_refused() -> None:
    with pytest.raises(BudgetError, match="cannot go below"):
        rescale(make_profile(measure="layer_average", tokens=60), 20)


@pytest.mark.parametrize(
    ("layers", "depth", "new_depth", "expected"),
    [
        ((2, 6, 15), 32, 32, (2, 6, 15)),
        ((2, 6, 15), 32, 40, (3, 8, 19)),
        ((2, 6, 15), 32, 64, (5, 13, 31)),
        ((2, 6, 15), 32, 8, (0, 1, 3)),
        ((2, 6, 15), 32, 4, (0, 1, 2)),
        ((1, 3), 4, 3, (0, 1)),
        ((7, 15, 23), 32, 8, (1, 3, 5)),
        ((28, 29, 30), 32, 8, (4, 5, 6)),
        ((0, 1, 2), 32, 8, (0, 1, 2)),
        ((30,), 32, 2, (0,)),
    ],
)
def test_layers_keep_their_share_of_the_depth(
    layers: tuple[int, ...], depth: int, new_depth: int, expected: tuple[int, ...]
) -> None:
    assert scale_layers(layers, depth, new_depth) == expected


@given(depth=st.integers(2, 60), new_depth=st.integers(2, 60), data=st.data())
def test_scaled_layers_are_valid_and_near_their_share(depth: int, new_depth: int, data: st.DataObject) -> None:
    places = st.sets(st.integers(0, depth - 2), min_size=1, max_size=5)
    layers = tuple(sorted(data.draw(places)))
    if len(layers) > new_depth - 1:
        with pytest.raises(ProfileError, match=f"{len(layers)} reducers do not fit; give {len(layers) + 1} layers"):
            scale_layers(layers, depth, new_depth)
        return
    scaled = scale_layers(layers, depth, new_depth)
    assert list(scaled) == sorted(set(scaled))
    assert 0 <= scaled[0] <= scaled[-1] <= new_depth - 2
    shares = [(layer + 1) * new_depth / depth for layer in layers]
    if all(b - a >= 2 for a, b in zip((0, *shares), (*shares, new_depth), strict=True)):
        assert all(abs(layer + 1 - share) <= 0.5 for layer, share in zip(scaled, shares, strict=True))


def test_scaling_to_other_visual_tokens_scales_budget_minimum_and_schedules() -> None:
    profile = make_profile(
        (2, 6, 15), depth=32, visual=576, tokens=64, minimum=8, schedules={"192": [300, 200, 118], "64": [66, 34, 20]}
    )
    new = scale_to_model(profile, 8, 144)
    assert (new.model.num_decoder_layers, new.model.visual_tokens, new.layers) == (8, 144, (0, 1, 3))
    assert (new.budget.tokens, new.budget.minimum) == (16, 2)
    assert new.schedules == {"48": (75, 50, 30), "16": (17, 9, 5)}
    assert kept_counts(new) == (17, 9, 5)
    assert new.name == "test-8-layers"
    assert new.description == "Scaled from test (32 layers, 576 visual tokens)"
    assert new.provenance == {
        "scaled_from": {
            "architecture": "LlavaForConditionalGeneration",
            "num_decoder_layers": 32,
            "visual_tokens": 576,
            "name": "test",
        }
    }
    assert [r.discard for r in new.reducers] == [r.discard for r in profile.reducers]


def test_of_budgets_that_fall_together_the_largest_wins() -> None:
    schedules = {"30": [60, 50, 30], "26": [50, 40, 26], "28": [50, 45, 28]}
    new = scale_to_model(make_profile(tokens=30, schedules=schedules), 8, 10)
    assert new.schedules == {"3": (6, 5, 3)}


def test_scaling_to_the_same_model_changes_names_only() -> None:
    profile = make_profile(schedules={"10": [50, 20, 10]})
    new = scale_to_model(profile, 8, 100, name="mine")
    assert new.name == "mine"
    assert (new.reducers, new.budget, new.schedules) == (profile.reducers, profile.budget, profile.schedules)


def test_a_long_description_still_fits() -> None:
    new = scale_to_model(make_profile(description="x" * 4000), 16, 100)
    assert len(new.description) == 4000
    assert new.description.startswith("Scaled from test (8 layers, 100 visual tokens); of that one is said: xxx")


def test_a_budget_that_the_scaled_layers_cannot_reach_is_refused() -> None:
    # Of 8 layers the first reducer leaves 2 in front: 25 tokens; of 2 layers it leaves 1: 50.
    profile = make_profile((1,), measure="layer_average", tokens=40)
    with pytest.raises(BudgetError, match=r"cannot go below 50\.0"):
        scale_to_model(profile, 2, 100)


@pytest.mark.parametrize(("layers", "visual"), [(8, 0), (2000, 100)])
def test_sizes_that_no_profile_can_have_are_refused(layers: int, visual: int) -> None:
    with pytest.raises(ProfileError, match=r"profile\.model\."):
        scale_to_model(make_profile(), layers, visual)
