"""Counts at served budgets: which are tried, which one is taken, and what becomes of them in a whole search."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_cases import VISUAL, make_rules, make_settings, make_theta

from eos_search import run as search_run
from eos_search.comparison.searches import at_reachable_costs
from eos_search.main import main
from eos_search.run import run_search
from eos_search.run_folder import RESTARTS
from eos_search.schedules import fit_schedules, other_counts
from eos_search.selectors import named_selector
from eos_search.structure import Rules, read_structure
from eos_vllm.core.budget import cost, kept_counts
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import read_profile
from support.interruptions import broken_off

BEFORE: dict[str, Any] = {"select": named_selector("uniform"), "measure": "layer_average"}
FITTED: dict[str, Any] = {
    "select": "uniform", "budget": 12, "budget_measure": "layer_average", "constraint": "lagrangian", "steps": 2,
    "placement": (1, 2), "serve_budgets": (20, 12), "fit_rows": 8,
    "samples": 12,
}  # fmt: skip


def point(rules: Rules, acting: dict[int, float]) -> Any:
    return make_theta(acting if rules.select is not None else {k: v for k, v in acting.items() if k >= 0})()


@given(
    st.integers(4, VISUAL - 1),
    st.floats(0.1, 0.9),
    st.floats(0.1, 0.9),
    st.sampled_from([BEFORE, BEFORE | {"withdraw": 4}, {"measure": "final"}, BEFORE | {"minimum": 5}]),
)
def test_other_counts_cost_the_same(budget: int, first: float, second: float, changes: dict[str, Any]) -> None:
    rules = make_rules(**changes)
    structure = read_structure(point(rules, {-1: first, 1: second, 3: 0.5}), rules, budget)
    profile = structure.profile
    assert profile is not None
    found = list(other_counts(profile, structure.counts, budget, rules))
    assert len({counts[0] for counts in found}) == len(found)
    for counts in found:
        assert counts != structure.counts
        assert len(counts) == len(structure.counts)
        assert list(counts) == sorted(counts, reverse=True)
        assert min(counts) >= min(rules.minimum, VISUAL)
        withdrawn = [0] * (len(profile.reducers) - len(counts))
        assert abs(cost(profile, [*counts, *withdrawn], rules.measure) - budget) <= 0.5


def test_there_are_others_unless_one_reducer_has_to_meet_the_budget() -> None:
    for acting, some in (({-1: 0.5, 1: 0.5}, True), ({-1: 0.5}, False)):
        rules = make_rules(**BEFORE)
        structure = read_structure(make_theta(acting)(), rules, 12)
        assert structure.profile is not None
        assert bool(list(other_counts(structure.profile, structure.counts, 12, rules))) is some


def wants(first: Callable[[Any], int | None]) -> Any:
    """A loss that is lowest where the first count is what a row wants; indifferent where that is None."""

    def loss(row: Any, _values: Any, structure: Any) -> float:
        wanted = first(row)
        return 1.0 if wanted is None else abs(structure.counts[0] - wanted) / 10

    return loss


def test_the_best_counts_are_taken_and_no_others_for_nothing() -> None:
    rules = make_rules(**BEFORE, withdraw=4)
    values = point(rules, {-1: 0.4, 1: 0.5, 3: 0.5})
    own = read_structure(values, rules, 12).counts
    assert read_structure(values, rules, 12).profile is not None
    others = list(other_counts(read_structure(values, rules, 12).profile, own, 12, rules))  # type: ignore[arg-type]
    wanted = others[-1]
    assert fit_schedules(values, rules, (12,), range(8), wants(lambda _: wanted[0])) == {"12": (*wanted, 0)}
    # Indifferent, torn, and too few to have a standard error.
    torn = wants(lambda row: (own[0] - 5, own[0] + 5)[row % 2])
    for rows, loss in ((8, wants(lambda _: None)), (8, torn), (1, wants(lambda _: wanted[0]))):
        assert fit_schedules(values, rules, (12,), range(rows), loss) == {"12": (*own, 0)}


def test_one_wild_row_does_not_choose() -> None:
    """Probabilities are bounded: a row whose answer is lost by far says no more than one that is lost."""
    rules = make_rules(**BEFORE)
    values = point(rules, {-1: 0.4, 1: 0.5})
    structure = read_structure(values, rules, 12)
    own = structure.counts

    def loss(row: int, _values: Any, hard: Any) -> float:
        changed = hard.counts != own
        return (0.0 if changed else 1e6) if row == 0 else (0.2 if changed else 0.1)

    assert fit_schedules(values, rules, (12,), range(40), loss) == {"12": own}


def test_a_search_that_fits_writes_schedules_and_goes_on_where_it_was(small_path: Path, tmp_path: Path) -> None:
    whole = run_search(make_settings(small_path, tmp_path / "whole", **FITTED), quiet=True)
    for budget in (20, 12):
        counts = whole.profile.schedules[str(budget)]
        assert kept_counts(whole.profile, budget) == counts
        assert cost(whole.profile, counts, "layer_average") == pytest.approx(budget, abs=1)
    settings = make_settings(small_path, tmp_path / "run", **FITTED)
    with broken_off(search_run, "fit_schedules", lambda *_, **__: True, RuntimeError("killed")):
        run_search(settings, quiet=True)
    assert not (tmp_path / "run/theta.json").exists()
    run_search(settings, resume=True, quiet=True)
    assert (tmp_path / "run/theta.json").read_bytes() == whole.path.read_bytes()


def test_a_comparison_takes_the_counts_that_were_chosen_if_they_cost_what_it_asks() -> None:
    rules = make_rules(**BEFORE)
    values = point(rules, {-1: 0.4, 1: 0.5})
    structure = read_structure(values, rules, 12)
    assert structure.profile is not None
    chosen = list(other_counts(structure.profile, structure.counts, 12, rules))[-1]
    fitted = structure.profile.model_copy(update={"schedules": {"12": chosen}})
    assert at_reachable_costs(fitted, (20, 12))[0].schedules["12"] == chosen
    dearer = structure.profile.model_copy(update={"schedules": {"12": (VISUAL, VISUAL)}})
    assert at_reachable_costs(dearer, (20, 12))[0].schedules["12"] != (VISUAL, VISUAL)


def test_rows_that_choose_counts_are_none_of_the_steps(
    small_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def fit(_values: Any, _rules: Any, budgets: Any, rows: Any, loss: Any, _add_up: Any) -> dict[str, Any]:
        assert budgets == (20, 12)
        seen.extend(row.index for row in rows)
        return {}

    monkeypatch.setattr(search_run, "fit_schedules", fit)
    found = run_search(make_settings(small_path, tmp_path / "run", **FITTED, batch_size=1), quiet=True)
    assert len(seen) == len(set(seen)) == 8  # of twelve, two have been in steps
    assert set(found.profile.schedules) == {str(found.profile.budget.tokens)}


def test_counts_of_some_served_budgets(small_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def fit(_values: Any, _rules: Any, budgets: Any, *_: Any) -> dict[str, Any]:
        asked.append(budgets)
        return {}

    monkeypatch.setattr(search_run, "fit_schedules", fit)
    run_search(make_settings(small_path, tmp_path / "run", **FITTED, fit_budgets=(12,)), quiet=True)
    assert asked == [(12,)]
    with pytest.raises(SettingError, match="fit_budgets=13: is no served budget; choose from 20, 12"):
        run_search(make_settings(small_path, tmp_path / "other", **FITTED, fit_budgets=(13,)), quiet=True)


def test_counts_are_chosen_by_rows_that_are_left_and_at_served_budgets(small_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="fit_rows=11: the steps see 2 of 12 rows"):
        run_search(make_settings(small_path, tmp_path / "run", **(FITTED | {"fit_rows": 11}), batch_size=1), quiet=True)
    with pytest.raises(SettingError, match="fit_rows=9: the steps see 4 of 13 rows"):  # 9 are asked as 5 batches of 2
        run_search(make_settings(small_path, tmp_path / "run", **(FITTED | {"fit_rows": 9, "samples": 13})), quiet=True)
    with pytest.raises(SettingError, match="fit_rows=8: there is no served budget to choose counts at"):
        run_search(make_settings(small_path, tmp_path / "run", **(FITTED | {"serve_budgets": ()})), quiet=True)
    assert not (tmp_path / "run").exists()


def test_of_several_starts_only_the_best_is_fitted(small_path: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "config.json", tmp_path / "runs"
    config.write_text(json.dumps(make_settings(small_path, output, **FITTED).to_dict()))
    argv = ["run", "--config", str(config), "--restarts-select", "uniform,maxmin", "--quiet"]
    assert main(argv) == 0
    told = json.loads((output / RESTARTS).read_text())
    losses = {end["folder"]: end["final"]["loss"] for end in told["searches"]}
    assert len(losses) == 2
    assert told["best"] == min(losses, key=lambda name: losses[name])
    assert [path.parent.name for path in output.rglob("start-*/theta.json")] == [told["best"]]
    assert {"20", "12"} <= set(read_profile(output / "theta.json").schedules)
    before = (output / "theta.json").read_bytes()
    assert main([*argv, "--resume"]) == 0
    assert (output / "theta.json").read_bytes() == before


def test_processes_agree_by_their_sums() -> None:
    """Two processes with half of the rows each choose what one with all of them does."""
    rules = make_rules(**BEFORE)
    values = point(rules, {-1: 0.4, 1: 0.5})
    loss = wants(lambda row: 14 + row % 3)
    alone = fit_schedules(values, rules, (12,), [*range(8)] * 2, loss)
    doubled = fit_schedules(values, rules, (12,), range(8), loss, lambda sums: 2 * sums)
    assert alone == doubled
