"""The hard reading of Theta: acting layers, counts, and the profile that plans say the same about."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_cases import make_rules, make_theta

from eos_search.export import searched_profile
from eos_search.structure import acting_layers, read_structure
from eos_search.theta import Theta
from eos_vllm.core.budget import eq11_counts, kept_counts
from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import parse_profile

RAW = st.lists(st.lists(st.floats(-3, 3), min_size=7, max_size=7), min_size=6, max_size=6)


def test_the_highest_gates_above_the_threshold_act() -> None:
    rules = make_rules()
    assert acting_layers([0.6, 0.9, 0.4, 0.8, 0.7, 0.99], rules) == (1, 3, 4)
    assert acting_layers([0.6, 0.6, 0.6, 0.6, 0.6, 0.6], rules) == (0, 1, 2)
    assert acting_layers([0.5, 0.1, 0.1, 0.51, 0.1, 0.99], rules) == (3,)
    assert acting_layers([0.5] * 6, rules) == ()


@given(RAW)
def test_export_and_plan_keep_what_the_search_kept(raw: list[list[float]]) -> None:
    rules, theta = make_rules(), Theta(torch.tensor(raw))
    values = theta()
    structure = read_structure(values, rules)
    if not structure.acting:
        with pytest.raises(SettingError, match="nothing to serve"):
            searched_profile(theta, rules, "test", {})
        return
    tokens, expected = 36, []
    for layer in structure.acting:
        share = 1 - values.gate[layer].item() * values.discard[layer].item()
        tokens = max(1, int(share * tokens + 1e-9))
        expected.append(tokens)
    assert list(structure.counts) == expected
    profile = parse_profile(json.dumps(searched_profile(theta, rules, "test", {}).to_dict()))
    assert profile.layers == structure.acting
    assert eq11_counts(profile) == structure.counts
    plan = Planner(profile).plan(60, [ImageSpan(5, 36)])
    assert plan.kept == ((36, *structure.counts),)


def test_the_minimum_is_kept() -> None:
    theta = make_theta({0: 0.99, 1: 0.99, 2: 0.99})
    assert read_structure(theta(), make_rules(minimum=7)).counts == (7, 7, 7)


def test_another_budget_is_served_by_the_exported_profiles_rule() -> None:
    theta = make_theta({1: 0.5, 3: 0.5})
    exported = searched_profile(theta, make_rules(), "test", {})
    for budget in (36, 20, 10, 4):
        structure = read_structure(theta(), make_rules(), budget)
        assert structure.counts == kept_counts(exported, budget)
        assert Planner(structure.profile).plan(60, [ImageSpan(5, 36)]).kept == ((36, *structure.counts),)
    assert structure.candidates[2] == int(structure.counts[0] * 0.8)


def test_candidates_are_what_an_opening_gate_would_leave() -> None:
    structure = read_structure(make_theta({1: 0.5, 3: 0.5})(), make_rules())
    assert structure.counts == (19, 10)
    # Closed gates stand at 0.1 and would open at 0.5; all discard 0.4.
    assert structure.candidates == {0: int(36 * 0.8), 2: int(19 * 0.8), 4: int(10 * 0.8)}


def test_without_an_open_gate_there_is_no_profile() -> None:
    structure = read_structure(make_theta({})(), make_rules())
    assert (structure.acting, structure.counts, structure.profile) == ((), (), None)
    assert set(structure.candidates) == {0, 1, 2, 3, 4}
