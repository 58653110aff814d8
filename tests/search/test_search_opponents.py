"""Opponents of the search: costs that are met, what is proposed, and the race; no model takes part."""

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opponent_cases import datas, drive, embedded_sizes, make_space, most_gamma

from eos_search.corners import at_corner
from eos_search.opponents.base import Candidate, Outcome
from eos_search.opponents.costs import at_costs, latest_first_layer
from eos_search.opponents.one_knob import GAMMAS, PLACES, OneKnob, hand_made
from eos_search.opponents.racing import FACTOR, SpentError, race, rungs
from eos_search.opponents.random_search import RandomChooser, RandomSearch
from eos_search.opponents.settings import QUERIES
from eos_search.opponents.tpe import TPE
from eos_search.selectors import NAMED
from eos_vllm.core.budget import eq11_counts, kept_counts, layer_average
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.profile import Profile


def check_costs(profile: Profile, costs: tuple[int, ...]) -> None:
    """Counts of every cost: within half a token of it, and within 1 % from 50 tokens on."""
    assert profile.budget.measure == "layer_average"
    assert profile.budget.tokens == costs[0]
    assert eq11_counts(profile) == kept_counts(profile)
    for cost in costs:
        counts = kept_counts(profile, cost)
        assert all(a >= b for a, b in itertools.pairwise((profile.model.visual_tokens or 0, *counts)))
        off = abs(layer_average(profile, counts) - cost)
        assert off <= 0.5 + 1e-9
        assert cost < 50 or off <= 0.01 * cost


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(2, 32),
    visual=st.sampled_from([36, 144, 576, 2880]),
    shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    selectors=st.booleans(),
    most=st.integers(1, 4),
    minimums=st.sampled_from([(1,), (1, 8), (1, 30)]),
)
def test_every_point_of_the_space_has_its_costs(
    seed: int, depth: int, visual: int, shares: list[float], selectors: bool, most: int, minimums: tuple[int, ...]
) -> None:
    costs = tuple(dict.fromkeys(max(1, int(visual * share)) for share in shares))
    names = tuple(NAMED) if selectors else ()
    try:
        space = make_space(depth, costs, visual, selectors=names, max_reducers=most, minimums=minimums)
    except SettingError:
        assert not selectors
        assert min(costs) < visual / depth + 1
        return
    profile = space.draw(RandomChooser(str(seed)))
    check_costs(profile, costs)
    assert profile.budget.minimum in minimums
    assert 1 <= len(profile.reducers) <= most
    assert selectors or profile.before is None


@settings(max_examples=40)
@given(cost=st.integers(2, 575), depth=st.integers(2, 32))
def test_the_latest_first_layer_is_the_last_that_can_meet_a_cost(cost: int, depth: int) -> None:
    model = make_space(depth).model
    latest = latest_first_layer(model, cost)
    for layer in range(depth - 1):
        # The layers up to the reducer see all tokens, those behind it one at least.
        least = (576 * (layer + 1) + depth - layer - 1) / depth
        assert (latest is not None and layer <= latest) == (least <= cost + 1e-9)


def test_a_cost_below_what_layers_can_reach_is_refused() -> None:
    with pytest.raises(SettingError, match=r"cost=60: layer 0 alone sees 576 tokens, 72\.0 on average"):
        make_space(8, (100, 60), selectors=())
    assert make_space(8, (100, 60)).latest is None
    base = hand_made(embedded_sizes())[0]
    fastv = next(profile for profile in hand_made(embedded_sizes()) if profile.name == "embedded-fastv")
    with pytest.raises(BudgetError, match="cannot go below 216"):
        at_costs(fastv, (128,))
    check_costs(at_costs(base, (128, 64)), (128, 64))


def test_a_cost_above_what_a_withdrawal_leaves_is_refused() -> None:
    """The last layers have none of the image, whatever the others keep."""
    bases = {profile.name: profile for profile in hand_made(embedded_sizes())}
    with pytest.raises(BudgetError, match=r"come to 432\.0 at most"):
        at_costs(bases["embedded-shared-image"], (500,))
    names = {candidate.about["base"] for candidate in OneKnob(list(bases.values()), (500,), QUERIES, 0).propose()}
    assert "embedded-fastv" in names
    assert "embedded-shared-image" not in names


def test_without_a_place_inside_the_decoder_all_points_begin_before_it() -> None:
    space = make_space(8, (60,))
    drawn = [space.draw(RandomChooser(str(seed))) for seed in range(30)]
    assert all(profile.before is not None for profile in drawn)
    assert {len(profile.reducers) for profile in drawn} == {1, 2, 3}


@pytest.mark.parametrize("method", [RandomSearch, TPE])
def test_the_same_seed_proposes_the_same(method: Any) -> None:
    if method is TPE:
        pytest.importorskip("optuna")
    space = make_space()
    first, again, other = (drive(method(space, seed), 4, most_gamma) for seed in (7, 7, 8))
    assert datas(first) == datas(again) != datas(other)
    for candidate in itertools.chain(*first):
        check_costs(candidate.profile, (128,))


def test_points_cover_the_space() -> None:
    groups = drive(RandomSearch(make_space(costs=(300,), minimums=(1, 8, 16)), 0), 20, most_gamma)
    profiles = [candidate.profile for candidate in itertools.chain(*groups)]
    assert {profile.importance.queries for profile in profiles} == set(QUERIES)
    assert {profile.budget.minimum for profile in profiles} == {1, 8, 16}
    assert {len(profile.reducers) for profile in profiles} == {1, 2, 3}
    assert {layer for profile in profiles for layer in profile.layers} == set(range(7))
    assert {profile.before is None for profile in profiles} == {True, False}
    gammas = [reducer.gamma for profile in profiles for reducer in profile.reducers]
    assert min(gammas) == 0 < max(gammas)


def test_tpe_learns_what_scores() -> None:
    pytest.importorskip("optuna")
    space = make_space()
    groups = drive(TPE(space, 0), 8, most_gamma)
    means = [sum(most_gamma(candidate.profile) for candidate in group) / len(group) for group in groups]
    assert sum(means[-3:]) / 3 > 2 * means[0]


def test_tpe_is_told_who_fell_out_of_the_race() -> None:
    pytest.importorskip("optuna")
    opponent = TPE(make_space(), 0, width=3)
    group = opponent.propose()
    opponent.learn([Outcome(c, s, len(s) == 2) for c, s in zip(group, [(0.5, 0.4), (0.3,), (0.2,)], strict=True)])
    trials = opponent.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [trial.intermediate_values for trial in trials] == [{0: 0.5, 1: 0.4}, {0: 0.3}, {0: 0.2}]
    assert trials[0].value == 0.4


def test_tpe_without_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SettingError, match=r"method='tpe': it needs optuna.*eos-vllm\[search\]"):
        TPE(make_space(), 0)


def one_knob(cost: int = 128, seed: int = 0) -> OneKnob:
    return OneKnob(hand_made(embedded_sizes()), (cost,), QUERIES, seed, minimums=(1, 60))


def test_hand_made_profiles_are_those_of_the_model_or_scaled_to_it() -> None:
    names = {profile.name for profile in hand_made(embedded_sizes())}
    assert {"embedded-fastv", "embedded-pool", "embedded-vscan", "embedded-divprune"} <= names
    assert "embedded-searched" not in names
    assert "embedded-eos" in names
    sizes = replace(embedded_sizes(), num_decoder_layers=12, visual_tokens=144)
    scaled = hand_made(sizes)
    assert {"fastv-llava-1.5-7b", "sparsevlm-v2-llava-1.5-7b", "two-stage-llava-1.5-7b"} <= {p.name for p in scaled}
    assert "eos-llava-1.5-7b" not in {p.name for p in scaled}, "a search found it"
    assert all((p.model.num_decoder_layers, p.model.visual_tokens) == (12, 144) for p in scaled)
    opponent = OneKnob(scaled, (40,), QUERIES, 0)
    assert len(opponent.bases) == len(scaled)
    for candidate in opponent.propose():
        check_costs(candidate.profile, (40,))


def test_one_knob_tunes_rules_then_transfer_then_schedules() -> None:
    groups = drive(one_knob(), 9, most_gamma)
    assert len(groups) == 3
    for candidate in itertools.chain(*groups):
        check_costs(candidate.profile, (128,))
    rules, transfers, schedules = groups
    tuned: dict[str, set[str]] = {}
    for candidate in rules:
        tuned.setdefault(candidate.about["base"], set()).add(candidate.about["queries"])
    bases = {profile.name: profile for profile in hand_made(embedded_sizes())}
    assert set(bases) <= set(tuned)
    assert tuned["embedded-fastv"] == tuned["embedded-eos"] == tuned["prune@embedded-vscan"] == set(QUERIES)
    assert tuned["embedded-divprune"] == {"image"}
    # Layer 2 is too late for this cost: all reducers move forward together.
    moved = {c.profile.layers for c in rules if c.about["base"] in ("embedded-sparsevlm-v2", "embedded-fastv")}
    assert moved == {(0, 1, 3), (0,)}
    # At full strength two of them are embedded-pool and embedded-tome-style, which have been judged.
    assert len(transfers) == 2 * PLACES * len(GAMMAS) - 2
    for candidate in transfers:
        corner = candidate.about["base"].split(" at ")[0]
        expected = at_corner(candidate.profile, corner).reducers
        for reducer, like in zip(candidate.profile.reducers, expected, strict=True):
            assert (reducer.tau, reducer.theta, reducer.rho) == (like.tau, like.theta, like.rho)
            assert reducer.gamma in (candidate.about["gamma"], 0.0)
    assert {candidate.about.get("ratio") for candidate in schedules} == {None, 0.25, 0.5, 1.0, 2.0, 4.0}
    lifted = [candidate.profile for candidate in schedules if candidate.about.get("minimum") == 60]
    assert min(kept_counts(profile)[-1] for profile in lifted if profile.before is None) == 60
    assert all("minimum" in candidate.about for candidate in schedules if "ratio" not in candidate.about)
    does = [(c.profile.schedules, c.profile.importance, c.profile.reducers) for c in itertools.chain(*groups)]
    assert len({str(one) for one in does}) == len(does), "a least count that changes nothing is asked again"
    firsts = {kept_counts(c.profile)[0] for c in schedules if c.about["base"] == "embedded-sparsevlm-v2"}
    assert len(firsts) > 1


def test_one_knob_goes_on_from_what_was_best() -> None:
    def score(profile: Profile) -> float:
        return (profile.importance.queries == "last_text") + (profile.layers == (0, 1, 3))

    rules, transfers, _ = drive(one_knob(), 3, score)
    assert any(candidate.profile.importance.queries == "all_text" for candidate in rules)
    at_best = [c for c in transfers if c.profile.layers == (0, 1, 3)]
    assert len(at_best) == 2 * len(GAMMAS) - 2
    assert {candidate.profile.importance.queries for candidate in at_best} == {"last_text"}


def test_one_knob_depends_on_its_seed_in_order_alone() -> None:
    first, again, other = (datas(drive(one_knob(seed=seed), 1, most_gamma))[0] for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other))


def test_rungs_grow_threefold_up_to_all_images() -> None:
    assert rungs(8, 72) == (8, 24, 72)
    assert rungs(8, 100) == (8, 24, 72, 100)
    assert rungs(5, 5) == (5,)
    assert rungs(1, 2) == (1, 2)


class Listed:
    """An opponent with given groups; it remembers what it learned."""

    def __init__(self, *sizes: int) -> None:
        profile = hand_made(embedded_sizes())[0]
        self.groups = [[Candidate(profile, {"i": i}) for i in range(size)] for size in sizes]
        self.learned: list[Outcome] = []

    def propose(self) -> list[Candidate]:
        return self.groups.pop(0) if self.groups else []

    def learn(self, outcomes: Any) -> None:
        self.learned += outcomes


def test_a_third_goes_on_at_each_rung() -> None:
    asked: list[tuple[int, int]] = []

    def score(number: int, candidate: Candidate, rung: int) -> float:
        asked.append((number, rung))
        return -abs(candidate.about["i"] - 4) + rung / 10

    opponent = Listed(9, 1)
    assert not race(opponent, score, 3)
    assert FACTOR == 3
    first = [*((i, 0) for i in range(9)), (3, 1), (4, 1), (5, 1), (4, 2)]
    assert asked == [*first, (9, 0), (9, 1), (9, 2)]
    assert [len(outcome.scores) for outcome in opponent.learned] == [1, 1, 1, 2, 3, 2, 1, 1, 1, 3]
    assert [outcome.finished for outcome in opponent.learned] == [i in (4, 9) for i in range(10)]
    ranked = sorted(opponent.learned[:9], key=lambda outcome: outcome.rank)
    assert ranked[-1].candidate.about["i"] == 4


def test_a_spent_budget_ends_the_race() -> None:
    asked: list[int] = []

    def score(number: int, candidate: Candidate, rung: int) -> float:
        if len(asked) == 5:
            raise SpentError
        asked.append(number)
        return 0.0

    opponent = Listed(9)
    assert race(opponent, score, 2)
    assert not opponent.learned
