"""The studies: what variants change and what they leave, how a study is run, and the command end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
from ablation_cases import FakeAnswerer, by_layers, make_profile, make_rows, study_result
from hypothesis import given
from hypothesis import strategies as st
from search_cases import make_settings

from eos_search.ablate_command import STUDIES, parse_grid
from eos_search.ablations import searches
from eos_search.ablations.searches import CE_OFF, LAMBDAS, alignment_searches, run_searches
from eos_search.ablations.study import Study, run_study, study_cases
from eos_search.ablations.tables import differences_to, study_table
from eos_search.ablations.variants import (
    BASE,
    GRID,
    Variant,
    operator_variants,
    pair_places,
    placement_label,
    placement_variants,
    relocated,
    robustness_variants,
    without,
)
from eos_search.main import main
from eos_search.planted_command import moves, table
from eos_search.raw import digest
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError, ProfileError, SettingError
from eos_vllm.core.profile import Profile


@st.composite
def profiles(draw: st.DrawFn, measure: str = "final") -> Profile:
    """Profiles of 3 to 16 layers with 1 to 4 reducers, some without transfer or reweighting."""
    depth = draw(st.integers(3, 16))
    layers = sorted(draw(st.sets(st.integers(0, depth - 2), min_size=1, max_size=min(4, depth - 1))))
    values = {"gamma": draw(st.sampled_from([0.0, 0.1])), "rho": draw(st.sampled_from([0.0, 0.25]))}
    return make_profile(layers, depth, 100, 10, measure=measure, values=values)


@given(profiles(), st.integers(1, 3))
def test_placement_moves_one_reducer_or_the_outer_pair_and_nothing_else(profile: Profile, stride: int) -> None:
    base = profile.layers
    found = placement_variants(profile, stride)
    assert len({variant.label for variant in found}) == len(found)
    for variant in found:
        layers = variant.profile.layers
        moved = [k for k in range(len(base)) if layers[k] != base[k]]
        assert moved
        assert len(moved) == 1 or moved == [0, len(base) - 1]
        assert all((layers[k] - base[k]) % stride == 0 for k in moved)
        assert kept_counts(variant.profile) == kept_counts(profile)
        assert relocated(variant.profile, base) == profile
        assert variant.about["layers"] == list(layers)


@given(profiles())
def test_every_place_between_its_neighbours_is_tried(profile: Profile) -> None:
    base, end = profile.layers, profile.model.num_decoder_layers - 1
    tried = {variant.profile.layers for variant in placement_variants(profile)}
    for k in range(len(base)):
        before, behind = (base[k - 1] if k else -1), (base[k + 1] if k + 1 < len(base) else end)
        for layer in range(before + 1, behind):
            places = (*base[:k], layer, *base[k + 1 :])
            assert (places in tried) == (places != base)


def test_pairs_are_the_cells_around_the_middle_reducer() -> None:
    assert pair_places((1, 3, 5), 7) == [(a, b) for a in (0, 1, 2) for b in (4, 5, 6)]
    assert pair_places((0, 2), 4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pair_places((3,), 7) == []


@given(profiles())
def test_operator_variants_change_one_number_that_matters(profile: Profile) -> None:
    found = operator_variants(profile)
    assert len({variant.label for variant in found}) == len(found)
    for variant in found:
        about, k = variant.about, variant.about["reducer"]
        before, behind = (p.reducers[k].model_dump() for p in (profile, variant.profile))
        changed = {name for name in before if before[name] != behind[name]}
        assert changed == {about["parameter"]}
        assert behind[about["parameter"]] == about["value"]
        assert relocated(variant.profile, profile.layers).reducers[:k] == profile.reducers[:k]
        assert variant.profile.reducers[k + 1 :] == profile.reducers[k + 1 :]
        if profile.reducers[k].gamma == 0:
            assert about["parameter"] not in ("tau", "theta")
            assert about["parameter"] != "nu" or profile.reducers[k].rho > 0
    swept = {variant.about["parameter"] for variant in found}
    assert {"gamma", "rho"} <= swept
    assert (swept == set(GRID)) == (profile.reducers[0].gamma > 0)


@given(profiles())
def test_removed_reducers_leave_the_budget(profile: Profile) -> None:
    for variant in robustness_variants(profile):
        assert kept_counts(variant.profile, 7)[-1] == 7
        missing = len(profile.reducers) - len(variant.profile.reducers)
        assert (missing == 1) == ("removed" in variant.about["note"])
        assert variant.profile.layers != profile.layers


def test_robustness_is_table_9_for_the_papers_placement() -> None:
    profile = make_profile((3, 6, 16), 32, 576, 64)
    notes = {variant.label: variant.about["note"] for variant in robustness_variants(profile)}
    assert notes["{3,4,16}"] == "reducer 2 earlier by 2"
    assert notes["{3,8,16}"] == "reducer 2 later by 2"
    assert notes["{2,6,15}"] == "default placement of the search"
    assert notes["{3,16}"] == "reducer 2 removed"
    assert "{5,6,16}" in notes
    assert "{3,6,16}" not in notes


def test_schedules_go_where_layers_were_part_of_them() -> None:
    schedules = {"6": [18, 9, 6]}
    final = make_profile(schedules=schedules)
    average = make_profile(measure="layer_average", tokens=20, schedules={"20": [18, 9, 6]})
    assert kept_counts(relocated(final, (0, 2, 4))) == (18, 9, 6)
    assert relocated(average, (0, 2, 4)).schedules == {}
    assert without(final, 1).schedules == {}
    with pytest.raises(ProfileError, match="3 reducers"):
        relocated(final, (1, 2))
    with pytest.raises(ProfileError, match="too deep"):
        relocated(final, (1, 2, 5))


def no_progress(_: str) -> Any:
    return lambda _: None


HEADER = {"model": "fake", "max_tokens": 8, "chance": {}}


def test_a_study_asks_only_what_it_lacks(tmp_path: Path) -> None:
    profile, rows, out = make_profile(), make_rows(), tmp_path / "raw" / "study.json"
    two = [Variant(BASE, profile), Variant("gamma", make_profile(values={"gamma": 0.4}), {"value": 0.4})]
    first, second = FakeAnswerer(by_layers), FakeAnswerer(by_layers)
    run_study(Study("operator", tuple(two), profile), [8], rows, first, HEADER, out, no_progress)
    assert first.asked == [("none", None), (BASE, 8), ("gamma", 8)]
    assert json.loads(out.read_text())["cases"][2]["value"] == 0.4
    # Another profile under the same label is asked again; so are new budgets, and nothing else.
    two[1] = Variant("gamma", make_profile(values={"gamma": 0.5}), {"value": 0.5})
    result = run_study(Study("operator", tuple(two), profile), [8, 4], rows, second, HEADER, out, no_progress)
    assert second.asked == [(BASE, 4), ("gamma", 8), ("gamma", 4)]
    assert result == json.loads(out.read_text())
    assert [(case["profile"], case["budget"]) for case in result["cases"]] == [
        ("none", None),
        *((name, budget) for name in (BASE, "gamma") for budget in (8, 4)),
    ]
    # A narrower study leaves the rest in the file.
    third = FakeAnswerer(by_layers)
    run_study(Study("operator", (two[0],), profile), [8], rows, third, HEADER, out, no_progress)
    assert third.asked == []
    assert len(json.loads(out.read_text())["cases"]) == 5
    with pytest.raises(EosError, match="another base"):
        run_study(Study("operator", (), make_profile((0, 1, 2))), [8], rows, third, HEADER, out, no_progress)
    with pytest.raises(EosError, match="another fingerprint"):
        run_study(Study("operator", (), profile), [8], rows[1:], third, HEADER, out, no_progress)


def test_a_stop_loses_neither_old_nor_new_answers(tmp_path: Path) -> None:
    profile, rows, out = make_profile(), make_rows(), tmp_path / "study.json"
    names = {"a": 0.4, "b": 0.5, "c": 0.6}
    variants = {name: Variant(name, make_profile(values={"gamma": gamma})) for name, gamma in names.items()}

    def stops_at_b(case: Any) -> int:
        if case.name == "b":
            raise KeyboardInterrupt
        return 1

    only_c = Study("operator", (variants["c"],), profile)
    run_study(only_c, [8], rows, FakeAnswerer(by_layers), HEADER, out, no_progress)
    study = Study("operator", tuple(variants.values()), profile)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, [8], rows, FakeAnswerer(stops_at_b), HEADER, out, no_progress)
    assert [case["profile"] for case in json.loads(out.read_text())["cases"]] == ["none", "a", "c"]


def test_cases_of_a_study() -> None:
    profile = make_profile()
    cases = study_cases(Study("operator", (Variant("a", profile), Variant("b", profile))), [8, None])
    assert [(case.name, case.budget) for case in cases] == [
        ("none", None),
        ("a", 8),
        ("a", None),
        ("b", 8),
        ("b", None),
    ]
    with pytest.raises(EosError, match="stands for two variants"):
        study_cases(Study("operator", (Variant("a", profile), Variant("a", profile))), [8])
    with pytest.raises(EosError, match="eos_retain=0"):
        study_cases(Study("operator", (Variant("a", profile),)), [0])
    assert digest(profile) == digest(make_profile(name="other", provenance={"seed": 1}))
    assert digest(profile) != digest(make_profile((1, 2, 3)))


def test_the_table_holds_accuracy_and_paired_points() -> None:
    profile = make_profile()
    result = study_result("robustness", profile, robustness_variants(profile), (16, 4))
    table = study_table(result)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    rows = {line.split("|")[1].strip(): line.split("|") for line in table.splitlines()}
    assert "100.0 (100.0 to 100.0)" in rows["all tokens"][2]
    assert rows[BASE][3].strip() == ""
    assert rows["{1,2}"][-2].strip() == "reducer 3 removed"
    apart = differences_to(result, BASE)
    # by_layers: 8 + 7 right of 24 at 16 tokens with the base, 8 + 3 without its last reducer
    assert apart["{1,2}", 16]["average"].value == pytest.approx(-4 / 24)
    assert ("none", None) not in apart
    assert "-16.7" in rows["{1,2}"][3]
    assert study_table(result | {"failed": {"lambda 0": "no layer reduces"}}).endswith("lambda 0: no layer reduces")


def test_alignment_is_a_search_for_each_weight_and_one_without_answers(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "model", tmp_path / "unused", lambda_align=0.3)
    found = alignment_searches(settings, tmp_path / "runs")
    assert [search.settings.lambda_align for search in found] == [*LAMBDAS, 0.3]
    assert [search.settings.cross_entropy for search in found] == [True] * len(LAMBDAS) + [False]
    assert len({search.settings.output for search in found}) == len(found)
    assert {name for search in found for name in search.settings.differences(settings)} == {
        "lambda_align",
        "cross_entropy",
    }
    assert found[-1].label == CE_OFF
    with pytest.raises(SettingError, match="lambda_align"):
        alignment_searches(settings, tmp_path, (-1.0,))


def test_searches_that_find_nothing_are_told_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(settings: Any, quiet: bool) -> Profile:
        if settings.lambda_align == 0:
            raise SettingError("gate_threshold", 0.5, "no layer reduces", "raise lambda_budget")
        if settings.lambda_align == 9:
            raise SettingError("data", "x", "is empty", "give other data")
        return make_profile()

    monkeypatch.setattr(searches, "profile_of", search)
    settings = make_settings(tmp_path / "model", tmp_path)
    told: list[str] = []
    found, failed = run_searches(alignment_searches(settings, tmp_path, (0.0, 0.1)), told.append)
    assert [variant.label for variant in found] == ["lambda 0.1", CE_OFF]
    assert list(failed) == ["lambda 0"]
    assert len(told) == 3
    with pytest.raises(SettingError, match="is empty"):
        run_searches(alignment_searches(settings, tmp_path, (9.0,)), told.append)


def test_grids_are_read() -> None:
    assert parse_grid(["gamma=0,0.5,0.5", "tau=1"]) == {"gamma": (0.0, 0.5), "tau": (1.0,)}
    for wrong in ("delta=1", "gamma", "gamma=a"):
        with pytest.raises(SettingError, match="no grid"):
            parse_grid([wrong])


@pytest.fixture(scope="module")
def on_the_small_model(small_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Arguments of a small evaluation, and a profile of the small model as a file."""
    folder = tmp_path_factory.mktemp("ablate")
    (folder / "theta.json").write_text(json.dumps(make_profile((1, 4)).to_dict()))
    flags = ["--model", str(small_path), "--images", "2", "--per-kind", "1", "--max-tokens", "2", "--processes", "1"]
    return {"profile": str(folder / "theta.json"), "flags": " ".join(flags)}


def test_robustness_runs_on_a_model(
    on_the_small_model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "robustness.json"
    argv = ["ablate", "robustness", "--profile", on_the_small_model["profile"], "--out", str(out)]
    assert main([*argv, "--budgets", "36,3", *on_the_small_model["flags"].split()]) == 0
    result = json.loads(out.read_text())
    replies = {(case["profile"], case["budget"]): case["replies"] for case in result["cases"]}
    expected = [BASE, *(variant.label for variant in robustness_variants(make_profile((1, 4))))]
    assert list(dict.fromkeys(name for name, _ in replies)) == ["none", *expected]
    assert all(replies[name, 36] == replies["none", None] for name in expected)
    assert any(replies[name, 3] != replies["none", None] for name in expected)
    assert all(case["kept"][-1] == case["budget"] for case in result["cases"] if case["budget"])
    assert "| {1} |" in capsys.readouterr().out


def test_reading_runs_on_a_model(
    on_the_small_model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reading.json"
    argv = ["ablate", "reading", "--benchmark-version", "2", "--out", str(out), *on_the_small_model["flags"].split()]
    assert main(argv) == 2
    assert "take a model that reads its images" in capsys.readouterr().err, "this one answers at random"
    result = json.loads(out.read_text())
    assert [case.get("layer") for case in result["cases"]] == [None, 0, 1, 2, 3, 4]
    assert all(case["kept"] == [0] for case in result["cases"][1:])
    assert result["benchmark"]["source"] == "ClutterVQA 2 test"


def test_planted_searches_where_models_read(
    on_the_small_model: dict[str, str], small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, reading, out = (tmp_path / f"{name}.json" for name in ("config", "reading", "out"))
    about = {"budget_measure": "layer_average", "budget": 20, "constraint": "penalty"}
    settings = make_settings(small_path, tmp_path / "unused", steps=1, samples=4, batch_size=1, placement=(2,), **about)
    config.write_text(json.dumps(settings.to_dict()))
    flags = on_the_small_model["flags"].split()
    assert main(["ablate", "reading", "--out", str(reading), *flags]) == 2
    told = json.loads(reading.read_text())
    for case in told["cases"]:
        case["accuracy"]["average"]["value"] = 1.0 if case.get("layer", 9) > 2 else 0.4
    reading.write_text(json.dumps(told | {"chance": {"average": 0.3}}))
    argv = ["ablate", "planted", "--config", str(config), "--models", str(small_path), "--reading", str(reading)]
    argv += ["--seeds", "0,1", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main(argv) == 0
    (found,) = json.loads(out.read_text())["models"]
    assert found["depth"] == 3
    assert [(one["seed"], one["start"], one["apart"]) for one in found["searches"]] == [(0, [2], -1), (1, [2], -1)]
    printed = capsys.readouterr().out
    assert "2 of 2 within 1 layer" in printed
    assert [one["layer"] for one in found["places"]] == [0, 1, 2, 3, 4]
    assert all(one["error"] > 0 and one["kept"] == found["places"][0]["kept"] for one in found["places"])
    # The later it stands, the more tokens the layers see.
    costs = [one["cost"] for one in found["places"]]
    assert costs == sorted(set(costs))
    assert f"| 4 | {found['places'][4]['task']:.3f} ± " in printed
    found["searches"][0] = {"seed": 0, "failed": "no layer reduces"}
    assert table({"models": [found]}).splitlines()[2].endswith("| 3 | 0 |  | none |  |")
    assert "\n1 of 2 within 1 layer\n" in table({"models": [found]})
    assert table({"models": [{**found, "places": []} | {"searches": []}]}).endswith("| --- | --- |")
    assert moves([{"step": s, "acting": a} for s, a in enumerate(([1], [1], [2], [2]))]) == [
        {"step": 0, "acting": [1]},
        {"step": 2, "acting": [2]},
    ]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("theta.json")}
    assert main(argv) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("theta.json")} == before
    reading.write_text(json.dumps(json.loads(reading.read_text()) | {"weights": "another model's"}))
    assert main(argv) == 2
    assert "is no study of where" in capsys.readouterr().err


def test_alignment_searches_and_evaluates(
    on_the_small_model: dict[str, str], small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "alignment.json"
    settings = make_settings(small_path, tmp_path / "unused", steps=1, samples=4, batch_size=1).to_dict()
    config.write_text(json.dumps(settings))
    argv = ["ablate", "alignment", "--config", str(config), "--runs", str(tmp_path / "runs"), "--lambdas", "0.1"]
    argv += ["--budgets", "4", "--quiet", "--out", str(out), *on_the_small_model["flags"].split()]
    assert main(argv) == 0
    first = json.loads(out.read_text())
    assert [case["profile"] for case in first["cases"]] == ["none", "lambda 0.1", CE_OFF]
    assert [case.get("cross_entropy") for case in first["cases"]] == [None, True, False]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("theta.json")}
    assert len(before) == 2
    assert main(argv) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("theta.json")} == before
    assert main([*argv, "--steps", "2"]) == 2
    assert "steps=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["placement", "--profile", "no-such"], "neither a file nor a shipped profile"),
        (["placement", "--profile", "embedded-eos", "--stride", "0"], "stride=0"),
        (["operator", "--profile", "embedded-eos", "--grid", "x=1"], "no grid"),
        (["operator", "--profile", "embedded-eos", "--budgets", "many"], "--budgets='many'"),
        (["alignment", "--config", "embedded", "--lambdas", "a,b"], "no numbers"),
        (["alignment", "--config", "no-such"], "config='no-such'"),
        (["budgets", "--profiles", "embedded-eos,no-such"], "neither a file nor a shipped profile"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("eos-search: error: ")
    assert len(err.splitlines()) == 1


def test_every_study_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in STUDIES:
        with pytest.raises(SystemExit) as left:
            main(["ablate", name, "--help"])
        assert left.value.code == 0
        assert "--budgets" in capsys.readouterr().out
    assert placement_label((3, 6, 16)) == "{3,6,16}"
