"""Searches over the whole space: counts and operator before the decoder, inside it, and withdrawal."""

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import LAYERS, VISUAL, make_example, make_row, make_rules, make_settings, make_theta

from eos_search.estimators.base import KEEP_NAMES
from eos_search.estimators.choice import keep_estimator
from eos_search.estimators.differences import Differences
from eos_search.examples import Prepared, query_weights
from eos_search.export import reducer_lines, searched_profile
from eos_search.lagrangian import project
from eos_search.main import main
from eos_search.measures import SearchMeasure
from eos_search.objective import Objective, penalties, reference_rows, task_terms, tokens_left
from eos_search.reference import ReferenceModel
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.restarts import run_restarts
from eos_search.run import run_search
from eos_search.run_folder import RESTARTS, read_records
from eos_search.selectors import NAMED, named_selector
from eos_search.starts import add_start_flags, starts_of
from eos_search.structure import Rules, acting_of, read_structure
from eos_search.task import example_terms
from eos_search.theta import KINDS, Theta, start_values
from eos_vllm.core.budget import cost, layer_average
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import BEFORE, Withdrawal

Small = tuple[Any, Any]
OBJECTIVE = Objective(6, 3, VISUAL, (2, 3, 5), lambda_align=0.5)
SMOOTH = [kind for kind in KINDS if kind not in ("gate", "discard")]


def rules_with(select: str | None = "maxmin", withdraw: int | None = None, **changes: Any) -> Rules:
    return make_rules(select=named_selector(select), withdraw=withdraw, **changes)


@pytest.mark.parametrize(
    ("select", "acting", "withdraw", "images", "queries"),
    [
        ("maxmin", {BEFORE: 0.4}, None, 1, "relevant_text"),
        ("mmr", {BEFORE: 0.3, 1: 0.5, 3: 0.4}, None, 1, "relevant_text"),
        ("received", {BEFORE: 0.5, 2: 0.5}, 4, 2, "all_text"),
        ("cls", {BEFORE: 0.7}, 3, 1, "last_text"),
        (None, {0: 0.5, 2: 0.4}, 4, 2, "relevant_text"),
        (None, {}, 2, 1, "relevant_text"),
    ],
)
def test_the_value_is_the_reference_at_the_exported_profile(
    small: Small, select: str | None, acting: dict[int, float], withdraw: int | None, images: int, queries: str
) -> None:
    """The reference gets prompt and pictures, not what the search made of them."""
    rules, theta, row = rules_with(select, withdraw, queries=queries), make_theta(acting), make_row(3, images)
    example = make_example(small, row, rules)
    values = theta()
    structure = read_structure(values, rules)
    output = RelaxedModel(small[0], rules).forward(example, values, structure)
    profile = searched_profile(theta, rules, "test", {}) if acting else structure.profile
    assert profile is not None
    model = ReferenceModel(*small, profile)
    prompt = "USER: " + "<image>" * images + f"\n{row.question} ASSISTANT:"
    embeddings, spans, ids = model.embed(prompt, row.images.load())
    state = model.prefill(embeddings, spans, ids=ids.tolist())
    hidden = [state.hidden[-1:]]
    for i, token in enumerate(example.targets[:-1].tolist()):
        hidden.append(model._decode(token, len(embeddings) + i, state.cache))
    with torch.no_grad():
        logits = small[0].lm_head(torch.cat(hidden))
    assert len(output.kept) == len([layer for layer in acting if layer != BEFORE])
    inside = state.kept if withdraw is None else state.kept[:-1]
    for mine, theirs in zip(output.kept, inside, strict=True):
        assert mine[mine < len(embeddings)].tolist() == theirs.tolist()
    assert isinstance(profile.reducers[-1], Withdrawal) == (withdraw is not None)
    torch.testing.assert_close(output.logits.detach(), logits, rtol=1e-4, atol=2e-4)


def test_a_withdrawal_and_a_selection_change_the_value(small: Small) -> None:
    plain, theta = rules_with(None), make_theta({1: 0.3})
    example = make_example(small, make_row(3), plain)
    values = theta()
    with torch.no_grad():
        whole = RelaxedModel(small[0], plain).forward(example, values, read_structure(values, plain)).logits
        withdrawn = rules_with(None, 3)
        structure = read_structure(values, withdrawn)
        assert (RelaxedModel(small[0], withdrawn).forward(example, values, structure).logits - whole).abs().max() > 0.01


@pytest.fixture
def selected(exact: tuple[Any, Prepared]) -> tuple[Any, Prepared]:
    """The exact model, and its example with what the tower gave, all of it in float64."""
    model, _ = exact
    return model, make_example((model, _processor(model)), make_row(4), rules_with(queries="all_text"))


def _processor(model: Any) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model.config._name_or_path)


def loss_of(model: Any, example: Prepared, table: torch.Tensor, rules: Rules, **relaxation: Any) -> torch.Tensor:
    relaxed = RelaxedModel(model, rules, Relaxation(explore=False, **relaxation))
    reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
    values = rules.values(table)
    return example_terms(relaxed, OBJECTIVE, example, values, read_structure(values, rules), reference).total


def test_the_operator_before_the_decoder_has_the_derivative_of_the_value(selected: tuple[Any, Prepared]) -> None:
    rules, theta = rules_with("rarity", 4, queries="all_text"), make_theta({BEFORE: 0.4, 2: 0.5})
    model, example = selected
    table = theta().table.detach().requires_grad_()
    loss_of(model, example, table, rules, keep=keep_estimator("eq12", 0.0)).backward()
    assert table.grad is not None
    step = 1e-5
    for layer in (BEFORE, 2):
        for kind in SMOOTH:
            losses = []
            for sign in (1, -1):
                moved = table.detach().clone()
                moved[layer, KINDS.index(kind)] += sign * step
                with torch.no_grad():
                    losses.append(loss_of(model, example, moved, rules).item())
            expected = (losses[0] - losses[1]) / (2 * step)
            assert expected != 0
            found = table.grad[layer, KINDS.index(kind)].item()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-9), (kind, layer)


@pytest.mark.parametrize("name", KEEP_NAMES)
def test_the_count_before_the_decoder_is_measured_whatever_the_estimator(
    selected: tuple[Any, Prepared], name: Any
) -> None:
    """Differences of whole hard passes, whose counts are written down here."""
    rules, theta, width = rules_with(queries="all_text"), make_theta({BEFORE: 0.4, 2: 0.5}), 0.2
    model, example = selected
    values = theta()
    structure = read_structure(values, rules)
    first, second = structure.counts
    low, high = max(first - round(width * first), second), first + round(width * first)

    def hard(counts: tuple[int, int]) -> float:
        relaxed = RelaxedModel(model, rules)
        reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
        profile = structure.profile
        assert profile is not None
        changed = profile.model_copy(update={"schedules": {str(profile.budget.tokens): counts}})
        with torch.no_grad():
            at = replace(structure, profile=changed, counts=counts)
            output = relaxed.forward(example, values, at, OBJECTIVE.aligned)
            assert output.run is not None
            return task_terms(OBJECTIVE, output.run.example, output, reference).total.item()

    rise = (hard((high, second)) - hard((low, second))) / math.log(high / low)
    assert abs(rise) > 1e-6
    tables = []
    for before in (Differences(width), _Unmeasured()):
        table = values.table.detach().clone().requires_grad_()
        loss_of(model, example, table, rules, keep=keep_estimator(name, 10.0, width), before=before).backward()
        assert table.grad is not None
        tables.append(table.grad[BEFORE, KINDS.index("discard")].item())
    # d log K / d c = -1 / (1 - c) at a gate of 1.
    kept = 1 - values.discard[BEFORE].item()
    if name != "differences":
        assert tables[0] - tables[1] == pytest.approx(-rise / kept, rel=1e-5)
        return
    # That measures every count itself, and a share before the decoder is a factor of both.
    assert tables[0] == tables[1]
    step = max(1, round(width * second))
    ends = (second - step, second + step)
    behind = (hard((first, ends[1])) - hard((first, ends[0]))) / math.log(ends[1] / ends[0])
    assert tables[0] == pytest.approx(-(rise + behind) / kept, rel=1e-5)


class _Unmeasured(Differences):
    """Measures nothing."""

    def slopes(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return None


@pytest.mark.parametrize("measure", ["final", "layer_average", "flops"])
@pytest.mark.parametrize("withdraw", [None, 4])
def test_tokens_left_are_the_cost_of_the_profile(measure: SearchMeasure, withdraw: int | None) -> None:
    """But for rounding: counts are whole, and many of them."""
    rules = rules_with(withdraw=withdraw, visual=60_000)
    rules = replace(rules, model=rules.model.model_copy(update={"flops_crossover": 500}))
    theta = make_theta({BEFORE: 0.4, 1: 0.5, 3: 0.2})
    values = theta()
    structure = read_structure(values, rules)
    assert structure.acting == acting_of(values, rules) == (BEFORE, 1, 3)
    profile = structure.profile
    assert profile is not None
    objective = Objective(64, 3, 60_000, (), budget_measure=measure, crossover=500, withdraw=withdraw)
    counts = (*structure.counts, 0) if withdraw else structure.counts
    found = tokens_left(objective, values, structure.acting).item()
    assert found == pytest.approx(cost(profile, counts, measure), rel=2e-4)
    # C counts what is inside the decoder.
    assert penalties(objective, values, structure.acting).gates.item() == pytest.approx(2 * 0.9 + 3 * 0.1, rel=1e-6)


@pytest.mark.parametrize(("before", "withdraw"), [(True, None), (True, 4), (False, 4)])
@pytest.mark.parametrize("measure", ["final", "layer_average", "flops"])
def test_the_start_meets_the_budget(before: bool, withdraw: int | None, measure: SearchMeasure) -> None:
    budget = 100 if before else 280  # two layers of six see all tokens
    values = start_values(
        "warm", 6, 576, budget, 3, (1, 2), measure, crossover=500 if measure == "flops" else None, before=before,
        withdraw=withdraw,
    )  # fmt: skip
    theta = Theta.from_values(values, before=before)
    rules = rules_with("maxmin" if before else None, withdraw, visual=576)
    objective = Objective(budget, 3, 576, (), budget_measure=measure, crossover=500, withdraw=withdraw)
    found = theta()
    assert found.depth == 6
    assert tokens_left(objective, found, acting_of(found, rules)).item() == pytest.approx(budget, rel=1e-4)
    with torch.no_grad():
        theta.raw[:, KINDS.index("discard")] += 1
    assert project(theta, objective, rules, 1.0)
    moved = theta()
    assert tokens_left(objective, moved, acting_of(moved, rules)).item() == pytest.approx(budget, rel=1e-4)


def test_the_gate_before_the_decoder_is_fixed() -> None:
    theta = make_theta({BEFORE: 0.4, 2: 0.5})
    theta().table.sum().backward()
    assert theta().gate[BEFORE].item() == 1
    assert theta().gate[LAYERS - 1].item() == 0
    assert theta.raw.grad is not None
    learns = theta.raw.grad != 0
    gate = KINDS.index("gate")
    assert not learns[BEFORE, gate]
    assert not learns[LAYERS - 1, gate]
    assert learns[BEFORE].sum() == len(KINDS) - 1
    assert learns[2].all()


@pytest.mark.parametrize("measure", ["final", "layer_average"])
def test_gates_behind_a_withdrawal_learn_nothing(measure: SearchMeasure) -> None:
    """Neither from the budget nor from the number of reducers, of which they are none."""
    raw = make_theta({1: 0.5}).raw.detach()
    theta, rules = Theta(raw, places=3), rules_with(None, 3)
    objective = Objective(4, 1, VISUAL, (), budget_measure=measure, withdraw=3)
    values = theta()
    found = penalties(objective, values, acting_of(values, rules))
    assert found.gates.item() == pytest.approx(0.9 + 2 * 0.1)
    (found.budget + found.cost).backward()
    assert theta.raw.grad is not None
    assert theta.raw.grad[:3, 0].abs().min() > 0
    assert theta.raw.grad[3:].abs().max() == 0


def test_gates_behind_a_withdrawal_are_no_places() -> None:
    rules, theta = rules_with(None, 3), make_theta({1: 0.5, 2: 0.5, 4: 0.5})
    structure = read_structure(theta(), rules)
    assert structure.acting == (1, 2)
    assert set(structure.candidates) == {0}
    assert structure.profile is not None
    assert structure.profile.schedules == {"10": (19, 10, 0)}
    with pytest.raises(SettingError, match="no layer reduces"):
        searched_profile(make_theta({}), rules, "a withdrawal alone", {})
    assert reducer_lines(structure.profile)[-1] == "layer 3   withdraws what is left"


def test_query_weights_are_those_of_what_enters(small: Small) -> None:
    """The rater rule looks at the tokens that the decoder gets, as the server's does."""
    rules, theta = rules_with(), make_theta({BEFORE: 0.5, 2: 0.5})
    example = make_example(small, make_row(2), rules)
    values = theta()
    output = RelaxedModel(small[0], rules).forward(example, values, read_structure(values, rules))
    assert output.run is not None
    seen = output.run.example
    assert seen.spans[0].length == 18
    assert len(seen.embeddings) == len(example.embeddings) - 18
    assert seen.is_text.sum() == example.is_text.sum()
    expected = query_weights("relevant_text", seen.embeddings.detach(), seen.prompt_length, seen.spans)
    torch.testing.assert_close(seen.weights, expected)


def test_a_search_over_the_whole_space(small_path: Path, tmp_path: Path) -> None:
    """Same seed, same bytes; the profile has all three kinds, meets its budget, and says what it is."""
    changes = {
        "select": "maxmin", "withdraw": 4, "placement": (1, 2), "budget": 12, "budget_measure": "layer_average",
        "constraint": "lagrangian", "serve_budgets": (20, 12), "name": "whole",
    }  # fmt: skip
    one, two = (run_search(make_settings(small_path, tmp_path / name, **changes), quiet=True) for name in "ab")
    assert one.path.read_bytes() == two.path.read_bytes()
    profile = one.profile
    assert profile.before is not None
    assert profile.selector is not None
    assert profile.selector.rule == "maxmin"
    assert isinstance(profile.reducers[-1], Withdrawal)
    counts = profile.schedules[str(profile.budget.tokens)]
    assert layer_average(profile, counts) == pytest.approx(12, abs=1.5)
    assert profile.provenance["settings"]["select"] == "maxmin"
    assert "--select maxmin --withdraw 4" in profile.provenance["command"]
    records = read_records(tmp_path / "a")
    assert records[0]["acting"] == [-1, 1, 2]
    assert len(records[0]["values"]["gamma"]) == LAYERS + 1
    first, last = records[0]["values"], records[-2]["values"]
    assert first["gate"][BEFORE] == last["gate"][BEFORE] == 1
    for kind in ("discard", "gamma", "tau"):
        assert first[kind][BEFORE] != last[kind][BEFORE], kind


def test_starts_with_other_selectors_and_withdrawals(small_path: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "config.json", tmp_path / "runs"
    settings = make_settings(small_path, output, steps=2, placement=(1, 2))
    config.write_text(json.dumps(settings.to_dict()))
    starts = ["--restarts-select", "uniform,none", "--restarts-withdraw", "3,4", "--restarts-minimum", "2,3"]
    assert main(["run", "--config", str(config), "--quiet", *starts]) == 0
    told = json.loads((output / RESTARTS).read_text())
    found = [(end["select"], end["withdraw"], end["minimum"]) for end in told["searches"]]
    assert found == list(itertools.product(("uniform", None), (3, 4), (2, 3)))
    assert told["best"] in {end["folder"] for end in told["searches"]}
    assert (output / "start-select-uniform-withdraw-3-minimum-2/theta.json").is_file()


def test_all_starts_are_checked_before_any_begins(small_path: Path, tmp_path: Path) -> None:
    settings = make_settings(small_path, tmp_path / "runs", steps=2, budget=8, budget_measure="layer_average")
    starts = [{"select": "uniform"}, {"select": "typo"}], [{"select": "uniform"}, {"select": "none"}]
    for wrong, match in zip(starts, ("select='typo'", "budget=8: reducers at"), strict=True):
        with pytest.raises(SettingError, match=match):
            run_restarts(settings, wrong, quiet=True)
        assert not (tmp_path / "runs").exists()


def given(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_start_flags(parser)
    return parser.parse_args(flags)


def test_what_cannot_be_is_refused(small_path: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(SettingError, match=match):
            run_search(make_settings(small_path, tmp_path / "run", **changes), quiet=True)

    refused("select='resize': no selector has this name; choose from uniform", select="resize")
    refused(r"withdraw=5: of 6 layers, 4 is the last", withdraw=5)
    refused("max_reducers=3: a model of 6 layers has 2 places", withdraw=2, placement=(0, 1))
    refused(r"placement=.*images are withdrawn behind layer 4", withdraw=4)
    refused("align_on='visual'", select="maxmin", align_on="visual")
    refused("align_layers=.*behind layer 3", withdraw=3, max_reducers=2, placement=(1, 2), align_on="visual")
    below = {"budget_measure": "layer_average", "budget": 20, "serve_budgets": (20, 6)}
    refused("serve_budgets=6: layer 0 alone sees 36 tokens, which is 6.0", **below)
    unmet = r"reducers at layers 1, 2, 4 that leave {} at least cannot have it"
    refused("serve_budgets=7: " + unmet.format(1), **(below | {"serve_budgets": (20, 7)}))
    refused("serve_budgets=2: " + unmet.format(5), serve_budgets=(6, 2), minimum=5)
    refused("queries='image': the search needs text that asks", queries="image")
    with pytest.raises(SettingError, match="race=3: there is one start"):
        starts_of(given("--race", "3"))
    for text in ("maxmin", "maxmin,maxmin"):
        with pytest.raises(SettingError, match="restarts_select"):
            starts_of(given("--restarts-select", text))
    assert starts_of(given()) == [{}]
    assert (
        len(starts_of(given("--restarts", "0,1;2", "--restarts-select", "maxmin,none", "--restarts-withdraw", "3,4")))
        == 8
    )
    assert starts_of(given("--restarts-minimum", "1,8")) == [{"minimum": "1"}, {"minimum": "8"}]
    assert set(NAMED) >= {"maxmin", "uniform"}
