"""A budget that is met: measures of cost, the multiplier, the band, and the divergence from the unreduced answers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import VISUAL, kill_at, make_example, make_row, make_rules, make_settings, make_theta

from eos_search.lagrangian import WIDEST, BudgetMultiplier, band, project
from eos_search.measures import SearchMeasure, tokens_of
from eos_search.objective import Objective, reference_rows, task_terms, tokens_left
from eos_search.relaxed import RelaxedModel
from eos_search.run import run_search
from eos_search.settings import read_config, read_settings
from eos_search.space import search_space
from eos_search.structure import read_structure
from eos_search.theta import Theta
from eos_vllm.core.budget import cost
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import ModelSpec, Profile, parse_profile

SHARES = st.lists(st.floats(0.02, 0.95), min_size=3, max_size=3)
MEASURES: list[SearchMeasure] = ["final", "layer_average", "kv_bytes", "flops"]
# Gates stay, so that they leave room; discards move fast.
MET: dict[str, Any] = {
    "constraint": "lagrangian",
    "frozen": "gate",
    "learning_rate": 0.5,
    "steps": 10,
    "log_every": 1,
}


def profile_of(counts: list[int]) -> Profile:
    model = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 6, "visual_tokens": VISUAL}
    numbers = {"gate": 1.0, "discard": 0.5, "gamma": 0.1, "tau": 0.3, "theta": 0.1, "rho": 0.2, "nu": 0.3}
    return parse_profile(
        {
            "schema": "eos-profile/2",
            "name": "made up",
            "model": model | {"flops_crossover": 500},
            "reducers": [{"layer": layer, **numbers} for layer in (1, 2, 4)],
            "budget": {"measure": "final", "tokens": counts[-1]},
        }
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_those_of_profiles(measure: SearchMeasure) -> None:
    counts = [20, 9, 4]
    left = torch.tensor([36, 20, 9, 9, 4, 4], dtype=torch.float64)
    expected = cost(profile_of(counts), counts, measure)
    assert tokens_of(VISUAL, left, measure, 500).item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(SHARES, st.integers(2, 30), st.sampled_from(MEASURES), st.sampled_from([1.0, 1.1, 1.5]))
def test_projection_brings_the_count_into_the_band(
    discards: list[float], budget: int, measure: SearchMeasure, factor: float
) -> None:
    theta, rules = make_theta(dict(zip((0, 2, 3), discards, strict=True))), make_rules()
    objective = Objective(budget, 3, VISUAL, (), budget_measure=measure, crossover=500)
    before = theta().table.detach()
    moved = project(theta, objective, rules, factor)
    values = theta()
    tokens = tokens_left(objective, values, (0, 2, 3)).item()
    # Gates of 0.9 leave a tenth at each reducer, whatever their discards.
    least_theta = make_theta(dict.fromkeys((0, 2, 3), 1.0))
    least = tokens_left(objective, least_theta(), (0, 2, 3)).item()
    assert budget / factor * (1 - 1e-6) <= tokens <= max(budget * factor, least) * (1 + 1e-4)
    if not moved:
        torch.testing.assert_close(values.table.detach(), before)
    elif least < budget * factor:
        shares = [torch.log1p(-table[[0, 2, 3], 0] * table[[0, 2, 3], 1]) for table in (before, values.table.detach())]
        powers = shares[1] / shares[0]
        # All by one power, but for discards that reach their end.
        free = values.table.detach()[[0, 2, 3], 1] < 1 - 1e-5
        torch.testing.assert_close(powers[free], powers[free][:1].expand(int(free.sum())), rtol=1e-4, atol=1e-6)
    closed = [1, 4, 5]
    torch.testing.assert_close(values.table.detach()[closed], before[closed])


def test_a_start_may_have_another_budget() -> None:
    """Else a penalty that pulls towards few tokens could not begin at a late layer."""
    config = read_config("clutter2-planted")
    model = ModelSpec(architecture="LlavaForConditionalGeneration", num_decoder_layers=12, visual_tokens=576)
    objective, _, theta = search_space(read_settings(config), model)
    assert objective.budget == 150
    assert tokens_left(objective, theta(), [5]).item() == pytest.approx(297)
    with pytest.raises(SettingError, match="budget=150: reducers at \\[5\\] leave"):
        search_space(read_settings(config | {"start_budget": None}), model)
    with pytest.raises(SettingError, match="start_budget=577: an image has 576"):
        search_space(read_settings(config | {"start_budget": 577}), model)


def test_without_an_open_gate_nothing_is_projected() -> None:
    theta = make_theta({})
    before = theta.raw.detach().clone()
    assert not project(theta, Objective(6, 3, VISUAL, ()), make_rules(), 1.0)
    torch.testing.assert_close(theta.raw.detach(), before, rtol=0, atol=0)


def test_the_band_closes() -> None:
    factors = [band(step, 100) for step in range(100)]
    assert WIDEST > factors[0] > 1.48
    assert factors == sorted(factors, reverse=True)
    assert factors[89:] == pytest.approx([1.005] * 11)


def test_the_multiplier_pulls_from_both_sides_and_learns() -> None:
    multiplier = BudgetMultiplier(2.0)
    for tokens, sign in ((8.0, 1), (2.0, -1)):
        left = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
        multiplier.term(left, 4).backward()
        assert left.grad is not None
        assert sign * left.grad.item() == pytest.approx(2 * math.log(2) / tokens)
    multiplier.update(8.0, 4)
    assert multiplier.value == pytest.approx(0.2 * math.log(2))
    other = BudgetMultiplier(2.0)
    other.load_state_dict(multiplier.state_dict())
    met = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    other.term(met, 4).backward()
    assert met.grad is not None
    assert met.grad.item() == pytest.approx(multiplier.value / 4)


@pytest.mark.parametrize(("measure", "budget"), [("final", 6), ("layer_average", 20), ("flops", 20)])
def test_the_budget_is_met_all_along_and_at_the_end(
    small_path: Path, tmp_path: Path, measure: SearchMeasure, budget: int
) -> None:
    settings = make_settings(small_path, tmp_path / "run", budget_measure=measure, budget=budget, **MET)
    result = run_search(settings, quiet=True)
    tokens = [record["terms"]["n_final"] for record in result.records]
    assert all(budget / 1.5 <= found <= budget * 1.5 for found in tokens)
    assert tokens[0] == pytest.approx(budget)
    assert any(abs(found / budget - 1) > 0.01 for found in tokens)
    left = [VISUAL]
    for layer in range(6):
        share = next((r.retain for r in result.profile.reducers if r.layer == layer), 1.0)
        left.append(left[-1] * share)
    crossover = result.profile.model.flops_crossover
    assert (crossover is None) == (measure != "flops")
    end = tokens_of(VISUAL, torch.tensor(left[1:], dtype=torch.float64), measure, crossover).item()
    assert end == pytest.approx(budget, rel=0.01)


def test_the_band_holds_while_gates_harden(small_path: Path, tmp_path: Path) -> None:
    """Tg goes from 1 to 5 between two steps: the same discards would then leave far less."""
    soft = {"gate_scale_start": 1.0, "gate_on": 0.6, "gate_off": 0.4, "gate_settled": 0.3}
    changes = {**soft, "constraint": "lagrangian", "budget": 6, "steps": 4, "log_every": 1}
    records = run_search(make_settings(small_path, tmp_path / "run", **changes), quiet=True).records
    gates = [record["values"]["gate"][1] for record in records]
    assert gates[0] == pytest.approx(0.6)
    assert gates[1] > 0.85
    assert all(6 / 1.5 <= record["terms"]["n_final"] <= 6 * 1.5 for record in records)


def test_the_penalty_alone_does_not_meet_it(small_path: Path, tmp_path: Path) -> None:
    settings = make_settings(small_path, tmp_path / "run", **(MET | {"constraint": "penalty"}))
    result = run_search(settings, quiet=True)
    end = VISUAL * math.prod(reducer.retain for reducer in result.profile.reducers)
    assert abs(end / 6 - 1) > 0.01
    assert "multiplier" not in result.records[0]["terms"]


def test_the_multiplier_goes_on_where_it_was(small_path: Path, tmp_path: Path) -> None:
    whole = run_search(make_settings(small_path, tmp_path / "whole", **MET), quiet=True)
    assert whole.records[-1]["terms"]["multiplier"] != 0
    settings = make_settings(small_path, tmp_path / "run", **MET)
    kill_at(5, settings)
    assert run_search(settings, resume=True, quiet=True).records == whole.records
    assert (tmp_path / "run/theta.json").read_bytes() == whole.path.read_bytes()


def test_discards_that_are_frozen_meet_no_budget(small_path: Path, tmp_path: Path) -> None:
    settings = make_settings(small_path, tmp_path / "run", constraint="lagrangian", frozen="discard")
    with pytest.raises(SettingError, match="constraint='lagrangian': frozen discards"):
        run_search(settings, quiet=True)


def divergence(small: tuple[Any, Any], theta: Theta, weight: float, **rules: Any) -> Any:
    """Terms with the divergence, and without; and the logits that they are of."""
    made = make_rules(**rules)
    objective = Objective(6, 3, VISUAL, (2, 4), lambda_kl=weight)
    example, relaxed = make_example(small, make_row(3), made), RelaxedModel(small[0], made)
    states = relaxed.reference(example, (2, 4, 5))
    answers = relaxed.answers(example, states[5])
    with torch.no_grad():
        output = relaxed.forward(example, theta(), read_structure(theta(), made), (2, 4))
        reference = reference_rows(objective, example, states)
        found = task_terms(objective, example, output, reference, answers)
        plain = task_terms(Objective(6, 3, VISUAL, (2, 4)), example, output, reference)
        whole = small[0].model.language_model(inputs_embeds=example.embeddings[None]).last_hidden_state
        full = small[0].lm_head(whole[0, -len(example.targets) :])
    torch.testing.assert_close(answers, full, rtol=1e-4, atol=1e-4)
    return found, plain, output.logits, full


def test_the_divergence_is_from_the_unreduced_answers(small: tuple[Any, Any]) -> None:
    found, plain, logits, full = divergence(small, make_theta({1: 0.6, 3: 0.6}), 0.7)
    expected = (full.softmax(-1) * (full.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert found.divergence is not None
    assert expected > 1e-6
    torch.testing.assert_close(found.divergence, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.total, plain.total + 0.7 * found.divergence)
    assert plain.divergence is None
    nothing_goes, _, _, _ = divergence(small, make_theta({1: 0.6}), 0.7, minimum=VISUAL)
    assert nothing_goes.divergence.abs() < 1e-6


def test_a_search_by_divergence_alone(small_path: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lambda_kl": 2.0, "lambda_align": 0, "cross_entropy": "false", "steps": 3}
    records = run_search(make_settings(small_path, tmp_path / "a", **changes), quiet=True).records
    for record in records:
        terms = record["terms"]
        penalties = terms["budget"] + terms["cost"]
        assert terms["divergence"] > 0
        assert terms["loss"] == pytest.approx(2 * terms["divergence"] + penalties)
    again = run_search(make_settings(small_path, tmp_path / "b", cache_mib=0, **changes), quiet=True).records
    assert again == records
    plain = run_search(make_settings(small_path, tmp_path / "c", steps=1), quiet=True)
    assert "divergence" not in plain.records[0]["terms"]
