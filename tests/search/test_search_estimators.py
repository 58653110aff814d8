"""Estimators of "how much": against differences of the hard loss, and blind to what changes no count."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from search_cases import VISUAL, kill_at, make_rules, make_settings, make_theta

from eos_search.counts import neighbours, soft_counts
from eos_search.estimators.base import KEEP_NAMES, KeepEstimator
from eos_search.estimators.choice import keep_estimator
from eos_search.estimators.differences import Differences
from eos_search.estimators.equation12 import Equation12
from eos_search.estimators.ghosts import Ghosts
from eos_search.examples import Prepared
from eos_search.flow import Flow, Reduction, Run
from eos_search.objective import Objective, TaskTerms, reference_rows, task_terms
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.run import run_search
from eos_search.selectors import named_selector
from eos_search.structure import Rules, Structure, read_structure
from eos_search.task import example_terms
from eos_search.theta import KINDS, Theta, ThetaValues
from eos_vllm.core.errors import SettingError

Exact = tuple[Any, Prepared]
OBJECTIVE = Objective(6, 3, VISUAL, (2, 3, 5), lambda_align=0.5)
SHARES = st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3)


# The paper's, one with budgets by cost, and one with reducers of all kinds.
SPACES = st.sampled_from(
    [
        {},
        {"measure": "layer_average"},
        {"measure": "layer_average", "minimum": 5},
        {"measure": "layer_average", "withdraw": 4, "select": named_selector("uniform")},
    ]
)


def rules_and_theta(space: dict[str, Any], discards: list[float]) -> tuple[Rules, Theta]:
    layers = (-1, 2, 3) if "select" in space else (0, 2, 3)
    return make_rules(**space), make_theta(dict(zip(layers, discards, strict=True)))


class Nothing:
    """Gives counts no gradient at all."""

    def at_reducer(self, flow: Flow, did: Reduction) -> None:
        return

    def slopes(self, run: Run, row: int, loss: Callable[[int, int], float]) -> torch.Tensor | None:
        return None


def terms(
    exact: Exact, keep: KeepEstimator, values: ThetaValues, rules: Rules, structure: Structure, row: int = 0
) -> TaskTerms:
    model, example = exact
    relaxed = RelaxedModel(model, rules, Relaxation(explore=False, keep=keep))
    reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
    return example_terms(relaxed, OBJECTIVE, example, values, structure, reference, row)


def gradient(
    exact: Exact, keep: KeepEstimator, theta: Theta, budget: int | None = None, row: int = 0, rules: Rules | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of the task loss to the mapped values, by kind ``[L]``."""
    rules = rules or make_rules()
    values = ThetaValues(theta().table.detach().requires_grad_())
    terms(exact, keep, values, rules, read_structure(values, rules, budget), row).total.backward()
    assert values.table.grad is not None
    return dict(zip(KINDS, values.table.grad.unbind(dim=1), strict=True))


def hard_loss(exact: Exact, theta: Theta, counts: tuple[int, ...], budget: int | None = None) -> float:
    """Loss of a whole pass with these counts, however Theta came to them."""
    rules, values = make_rules(), theta()
    structure = read_structure(values, rules, budget)
    profile = structure.profile
    assert profile is not None
    profile = profile.model_copy(update={"schedules": {str(profile.budget.tokens): counts}})
    with torch.no_grad():
        return terms(exact, Nothing(), values, rules, replace(structure, profile=profile, counts=counts)).total.item()


@settings(deadline=None)
@given(SHARES, st.sampled_from([None, 1, 5, 20, 36, 40]), SPACES)
def test_soft_counts_are_the_counts_before_rounding(
    discards: list[float], budget: int | None, space: dict[str, Any]
) -> None:
    rules, theta = rules_and_theta(space, discards)
    values = theta()
    assume(budget != read_structure(values, rules).counts[-1])  # whose counts are Eq. 11's, a schedule of the profile
    structure = read_structure(values, rules, budget)
    soft = soft_counts(values, structure, rules)
    for found, count in zip(soft.logs.exp().tolist(), structure.counts, strict=True):
        # Eq. 11 rounds down at every reducer; a budget's counts are rounded once.
        assert -1e-6 <= found - count < 3 if budget is None else abs(found - count) <= 0.5 + 1e-6


@settings(deadline=None)
@given(SHARES, st.integers(1, 35), st.lists(st.floats(-3, 3), min_size=3, max_size=3), SPACES)
def test_raising_all_shares_to_one_power_has_no_slope(
    discards: list[float], budget: int, slopes: list[float], space: dict[str, Any]
) -> None:
    """Under a budget that counts are scaled to; and it does change no count."""
    rules, theta = rules_and_theta(space, discards)
    values = rules.values(theta().table.detach().requires_grad_())
    assume(budget != read_structure(values, rules).counts[-1])
    structure = read_structure(values, rules, budget)
    soft = soft_counts(values, structure, rules)
    assert null_slope(theta, torch.autograd.grad((soft.logs * torch.tensor(slopes)).sum(), values.table)[0]) < 1e-9
    powered = theta().table.detach()
    powered[:, 1] = (1 - (1 - powered[:, 0] * powered[:, 1]) ** 0.9) / powered[:, 0].clamp(min=1e-9)
    assert structure.profile is not None
    assume(budget != read_structure(rules.values(powered), rules).counts[-1])
    moved = read_structure(rules.values(powered), rules, budget)
    for one, other in zip(structure.counts, moved.counts, strict=True):
        assert abs(one - other) <= 1  # a half may be rounded either way


def null_slope(theta: Theta, table: torch.Tensor) -> float:
    """Size of the slope along the direction that raises all shares to one power, by the discards of acting layers."""
    values = theta().table.detach()
    acting = values[:, 0] > 0.5  # the gate before the decoder is 1
    share = 1 - values[acting, 0] * values[acting, 1]
    direction = -share * share.log() / values[acting, 0]
    return abs((table[acting, 1] * direction).sum().item())


@pytest.mark.parametrize(("measure", "minimum"), [("layer_average", 1), ("flops", 1), ("layer_average", 5)])
def test_counts_scaled_to_a_cost_have_their_derivative(measure: str, minimum: int) -> None:
    """Against differences of the counts that another Theta is scaled to, before rounding."""
    rules, step = make_rules(measure=measure, minimum=minimum), 1e-6
    rules = replace(rules, model=rules.model.model_copy(update={"flops_crossover": 500}))
    theta = make_theta({0: 0.4, 2: 0.5, 3: 0.3})

    def logs(table: torch.Tensor) -> torch.Tensor:
        values = ThetaValues(table)
        return soft_counts(values, read_structure(values, rules, 15), rules).logs

    table = theta().table.detach().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    (found,) = torch.autograd.grad((logs(table) * weights).sum(), table)
    for layer in (0, 2, 3):
        for column in (0, 1):
            ends = []
            for sign in (1, -1):
                moved = table.detach().clone()
                moved[layer, column] += sign * step
                ends.append((logs(moved) * weights).sum().item())
            expected = (ends[0] - ends[1]) / (2 * step)
            # The last one's count is at the minimum of 5, and its discard then without effect.
            assert (abs(expected) > 1e-3) == (minimum == 1 or layer < 3)
            assert found[layer, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("budget", [18, 6])
def test_an_estimator_feels_nothing_where_no_count_changes(exact: Exact, budget: int) -> None:
    theta = make_theta({1: 0.6, 3: 0.3})
    for name in KEEP_NAMES:
        found = gradient(exact, keep_estimator(name), theta, budget)
        table = torch.stack([found[kind] for kind in KINDS], dim=1)
        force = table[[1, 3], 1].abs().max().item()
        assert force > 1e-6, name
        # Eq. 12 as it was pushes Theta along there for nothing.
        along = null_slope(theta, table)
        assert (along > 1e-2 * force) if name == "eq12" else (along < 1e-9), name


@pytest.mark.parametrize(("acting", "budget"), [({2: 0.6}, None), ({1: 0.5, 3: 0.5}, None), ({0: 0.4, 3: 0.6}, 8)])
def test_differences_are_those_of_whole_hard_passes(exact: Exact, acting: dict[int, float], budget: int | None) -> None:
    """Discards and acting gates: what passes with other counts give, written out here, by the rule of each count."""
    rules, theta, width = make_rules(), make_theta(acting), 0.2
    found, without = (gradient(exact, keep, theta, budget) for keep in (Differences(width), Nothing()))
    values = theta()
    structure = read_structure(values, rules, budget)
    counts, rises = structure.counts, []
    for place in range(len(counts)):
        sides = neighbours(counts, place, VISUAL, width)
        assert sides[0] < counts[place] < sides[1]
        low, high = (hard_loss(exact, theta, (*counts[:place], n, *counts[place + 1 :]), budget) for n in sides)
        rises.append((high - low) / math.log(sides[1] / sides[0]))
    assert all(rise != 0 for rise in rises)

    def logs(table: torch.Tensor) -> torch.Tensor:
        shares = [math.log(1 - table[layer, 0] * table[layer, 1]) for layer in acting]
        power = 1.0 if budget is None else math.log(budget / VISUAL) / sum(shares)
        found = [math.log(VISUAL) + power * sum(shares[: i + 1]) for i in range(len(shares))]
        return torch.tensor(found, dtype=torch.float64)

    step, table = 1e-6, values.table.detach()
    for layer in acting:
        for column, kind in enumerate(("gate", "discard")):
            moved = [table.clone(), table.clone()]
            moved[0][layer, column] += step
            moved[1][layer, column] -= step
            turn = (logs(moved[0]) - logs(moved[1])) / (2 * step)
            expected = (turn * torch.tensor(rises).double()).sum().item()
            # What a gate has beside its counts (the line of its anchors) is there without any estimator.
            assert (found[kind] - without[kind])[layer].item() == pytest.approx(expected, rel=1e-4, abs=1e-9), kind
            assert kind == "gate" or without[kind][layer] == 0


def test_a_pass_with_another_count_goes_on_where_the_two_part(exact: Exact) -> None:
    rules, theta = make_rules(), make_theta({1: 0.5, 2: 0.3, 3: 0.5})
    model, example = exact
    values = theta()
    relaxed = RelaxedModel(model, rules)
    structure = read_structure(values, rules)
    reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
    with torch.no_grad():
        output = relaxed.forward(example, values, structure, OBJECTIVE.aligned)
    for place, own in enumerate(structure.counts):
        for count in (own - 1, own + 1):
            other = relaxed.recount(output, place, count)
            assert [len(kept) - len(example.embeddings) + VISUAL for kept in other.kept] == [
                count if i == place else n for i, n in enumerate(structure.counts)
            ]
            counts = tuple(count if i == place else n for i, n in enumerate(structure.counts))
            found = task_terms(OBJECTIVE, example, other, reference).total.item()
            assert found == pytest.approx(hard_loss(exact, theta, counts), rel=1e-9)
    again = relaxed.recount(output, 1, structure.counts[1])
    torch.testing.assert_close(again.logits, output.logits)


@pytest.mark.parametrize("keep", [Ghosts(0.2), Differences(0.2), Equation12(0.0)])
def test_estimators_leave_value_and_operator_alone(exact: Exact, keep: KeepEstimator) -> None:
    theta, rules = make_theta({0: 0.4, 2: 0.5, 3: 0.5}), make_rules()
    found, without = gradient(exact, keep, theta), gradient(exact, Nothing(), theta)
    for kind in KINDS[2:]:
        torch.testing.assert_close(found[kind], without[kind], rtol=1e-7, atol=1e-12)
    values = ThetaValues(theta().table.detach().requires_grad_())
    structure = read_structure(values, rules)
    value = terms(exact, keep, values, rules, structure).total.item()
    assert value == pytest.approx(hard_loss(exact, theta, structure.counts), rel=1e-12)


def test_ghosts_are_the_derivative_of_tokens_that_come_and_go(exact: Exact) -> None:
    """One reducer, against a forward pass written out here in which a share of each neighbour is there."""
    rules, layer, width, step = make_rules(), 2, 0.2, 1e-6
    theta = make_theta({layer: 0.6})
    model, example = exact
    values = theta()
    structure = read_structure(values, rules)
    (own,) = structure.counts
    relaxed = RelaxedModel(model, rules)
    with torch.no_grad():
        output = relaxed.forward(example, values, structure, (layer,))
        reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
    low, high = neighbours(structure.counts, 0, VISUAL, width)
    base, decoder = output.states[layer], model.model.language_model

    def loss(count: int, share: float) -> float:
        """The pass with ``share`` of the one that keeps ``count``."""
        with torch.no_grad():
            state = relaxed.recount(output, 0, count).states[layer]
            both = torch.isin(base.positions, state.positions)
            theirs = torch.zeros(len(example.embeddings), base.hidden.shape[1], dtype=torch.float64)
            theirs[state.positions] = state.hidden
            hidden = base.hidden + share * both[:, None] * (theirs[base.positions] - base.hidden)
            extra = state.positions[~torch.isin(state.positions, base.positions)]
            positions = torch.cat([base.positions, extra])
            hidden = torch.cat([hidden, theirs[extra]])
            gone = extra.new_full((len(extra),), share, dtype=torch.float64)
            weight = torch.cat([1 - share * (~both).double(), gone]).log()
            sees = (positions[None] <= positions[:, None]) & (torch.arange(len(positions))[None] < len(both))
            mask = torch.where(sees, weight, -torch.inf)
            mask[len(both) :, len(both) :].fill_diagonal_(0.0)
            mask[: len(both), len(both) :] = torch.where(
                extra[None] <= base.positions[:, None], weight[len(both) :], -torch.inf
            )
            rotary = decoder.rotary_emb(hidden[None], positions[None])
            states = {layer: hidden[: len(both)]}
            for index in range(layer + 1, len(decoder.layers)):
                block = decoder.layers[index]
                hidden = block(hidden[None], position_embeddings=rotary, attention_mask=mask[None, None])[0]
                states[index] = hidden[: len(both)]
            answer = model.lm_head(decoder.norm(hidden[: len(both)][-len(example.targets) :]))
            is_text = example.is_text[base.positions]
            aligned = [(states[i][is_text] - reference[i]).square().mean() for i in OBJECTIVE.align_layers]
            entropy = torch.nn.functional.cross_entropy(answer, example.targets)
            return (entropy + OBJECTIVE.lambda_align * sum(aligned) / len(aligned)).item()

    rise = 0.0
    for count in (low, high):
        slope = (loss(count, step) - loss(count, step / 2)) / (step / 2)
        rise += own / (count - own) / 2 * slope
    found = gradient(exact, Ghosts(width), theta)["discard"][layer].item()
    gate, discard = values.gate[layer].item(), values.discard[layer].item()
    assert found == pytest.approx(-rise * gate / (1 - gate * discard), rel=1e-3)


def test_ghosts_at_later_reducers_choose_for_themselves(exact: Exact) -> None:
    """A neighbour has the counts of its own pass; its rows are those of the pass with ghosts, without what fades."""
    seen = []

    class Watched(Ghosts):
        def at_reducer(self, flow: Flow, did: Reduction) -> None:
            super().at_reducer(flow, did)
            text = len(did.run.example.embeddings) - VISUAL
            for neighbour in flow.neighbours:
                ghosts, ours = set(neighbour.ghosts.tolist()), set(flow.positions.tolist())
                missing = set(neighbour.missing.nonzero()[:, 0].tolist())
                assert not ghosts & ours
                assert missing <= ours
                assert set(neighbour.positions.tolist()) == (ours | ghosts) - missing
                assert len(neighbour.hidden) == len(ghosts)
                seen.append((did.place, len(neighbour.positions) - text, len(ghosts)))

    theta = make_theta({0: 0.4, 2: 0.5, 3: 0.5})
    gradient(exact, Watched(0.2), theta)
    counts = read_structure(theta(), make_rules()).counts
    assert counts == (23, 12, 6)
    found = [(place, count) for place, count, _ in seen]
    sides = [neighbours(counts, place, VISUAL, 0.2) for place in range(3)]
    assert found == [
        *((0, n) for n in sides[0]),
        *((1, n) for n in (12, 12, *sides[1])),
        *((2, n) for n in (6, 6, 6, 6, *sides[2])),
    ]
    assert any(ghosts for place, _, ghosts in seen if place == 2)


def test_differences_measure_every_so_many_rows(exact: Exact) -> None:
    theta = make_theta({1: 0.5, 3: 0.5})
    all_rows = gradient(exact, Differences(0.2), theta, row=4)["discard"]
    every = gradient(exact, Differences(0.2, every=4), theta, row=4)["discard"]
    torch.testing.assert_close(every, 4 * all_rows)
    assert (gradient(exact, Differences(0.2, every=4), theta, row=5)["discard"] == 0).all()


def test_there_is_no_room_beyond_other_counts() -> None:
    assert neighbours((20, 10, 9), 1, 36, 0.5) == (9, 15)
    assert neighbours((20, 16, 9), 1, 36, 0.5) == (9, 20)
    assert neighbours((36,), 0, 36, 0.1) == (32, 36)
    assert neighbours((3, 1), 1, 36, 0.1) == (1, 2)
    assert neighbours((2, 2), 0, 36, 0.1) == (2, 3)


def test_counts_that_cannot_move_have_no_gradient(exact: Exact) -> None:
    """Everything kept, by the minimum: no estimator breaks, and none pushes."""
    rules = make_rules(minimum=VISUAL)
    for name in KEEP_NAMES[1:]:
        found = gradient(exact, keep_estimator(name), make_theta({1: 0.5, 3: 0.5}), rules=rules)
        assert found["discard"].isfinite().all()
        assert name == "eq12_served" or (found["discard"] == 0).all()


def test_a_search_takes_its_estimator_and_goes_on_with_it(small_path: Path, tmp_path: Path) -> None:
    """Budgets in turn, differences at every second row; killed, it ends in the same bytes."""
    changes: dict[str, Any] = {"serve_budgets": (20, 6), "keep_every": 2, "keep_width": 0.2, "steps": 4, "samples": 8}
    ends = {}
    for name in KEEP_NAMES:
        result = run_search(make_settings(small_path, tmp_path / name, keep_estimator=name, **changes), quiet=True)
        ends[name] = tuple(reducer.discard for reducer in result.profile.reducers)
    assert len(set(ends.values())) == len(KEEP_NAMES)
    settings = make_settings(small_path, tmp_path / "run", keep_estimator="differences", **changes)
    kill_at(3, settings)
    again = run_search(settings, resume=True, quiet=True)
    assert again.path.read_bytes() == (tmp_path / "differences/theta.json").read_bytes()
    with pytest.raises(SettingError, match="keep_estimator='eq13'"):
        make_settings(small_path, tmp_path / "run", keep_estimator="eq13")
