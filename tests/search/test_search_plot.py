"""Figures: the data beside each PNG are what the raw result, the records or the model say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ablation_cases import FakeAnswerer, make_profile, make_rows, study_result
from PIL import Image
from search_cases import make_settings

from eos_search.ablations.study import Study, run_study
from eos_search.ablations.tables import reading_depth
from eos_search.ablations.variants import (
    Variant,
    base_variant,
    operator_variants,
    placement_variants,
    reading_variants,
    robustness_variants,
)
from eos_search.answerers import Case
from eos_search.main import main
from eos_search.plots.budgets import margin_figure
from eos_search.plots.equivalence import equivalence_figure, gaussian_checks
from eos_search.plots.patches import kept_patches, seen_picture, shade
from eos_search.plots.search import profile_figure, search_figure, trajectory
from eos_search.plots.studies import (
    alignment_figure,
    operator_figure,
    placement_figure,
    reading_figure,
    robustness_figure,
)
from eos_search.reference import ReferenceModel
from eos_search.run import run_search
from eos_search.run_folder import read_records
from eos_search.theta import KINDS
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError
from eos_vllm.models.images import sample_image

PROMPT = "USER: <image>\nIs there a circle? ASSISTANT:"


def percent(result: dict[str, Any], name: str, budget: int | None, kind: str = "average") -> float:
    """Accuracy of a case in percent."""
    (case,) = [c for c in result["cases"] if (c["profile"], c["budget"]) == (name, budget)]
    return 100 * case["accuracy"][kind]["value"]


def points(line: dict[str, Any]) -> dict[float, float]:
    """Value by x of a line of a figure's data."""
    return {point["x"]: point["value"] for point in line["points"]}


def test_placement_lines_and_cells_are_the_cases() -> None:
    profile = make_profile()
    result = study_result("placement", profile, placement_variants(profile))
    figure, data = placement_figure(result, "reading")
    assert data["base"] == [1, 2, 4]
    assert [line["label"] for line in data["lines"]["reducer 3"]] == ["retain 16", "retain 4"]
    last = points(data["lines"]["reducer 3"][1])
    assert last == {3: percent(result, "{1,2,3}", 4, "reading"), 4: percent(result, "base", 4, "reading")}
    assert list(points(data["lines"]["reducer 2"][0])) == [2, 3]
    pairs = data["pairs"]["16"]
    assert (pairs["first"], pairs["last"]) == ([0, 1], [3, 4])
    assert pairs["percent"][0][0] == percent(result, "{0,2,3}", 16, "reading")
    assert pairs["percent"][1][1] == percent(result, "base", 16, "reading")
    # Three reducers, two budgets, and the scales of two heat maps.
    assert len(figure.axes) == 3 + 2 + 2
    assert figure.axes[0].get_xlabel() == "after decoder layer"
    assert figure.axes[0].get_ylabel() == "right answers, % (95 % interval)"
    written = [text.get_text() for text in figure.axes[3].texts]
    assert written == [f"{value:.1f}" for row in pairs["percent"] for value in row]


def test_places_that_were_not_measured_stay_empty() -> None:
    profile = make_profile()
    variants = [v for v in placement_variants(profile) if v.label != "{0,2,3}"]
    data = placement_figure(study_result("placement", profile, variants))[1]
    assert data["pairs"]["16"]["percent"][0][0] is None


def test_one_reducer_has_no_heat_map() -> None:
    profile = make_profile((2,))
    figure, data = placement_figure(study_result("placement", profile, placement_variants(profile)))
    assert data["pairs"] == {}
    assert len(figure.axes) == 1


def test_operator_panels_hold_the_base_among_the_swept_values() -> None:
    profile = make_profile((1, 4))
    result = study_result("operator", profile, operator_variants(profile, {"gamma": (0.0, 1.0), "tau": (0.1, 2.0)}))
    figure, data = operator_figure(result)
    assert [(panel["layer"], panel["parameter"]) for panel in data["panels"]] == [
        (layer, name) for layer in (1, 4) for name in ("gamma", "tau")
    ]
    line = points(data["panels"][2]["lines"][0])
    assert list(line) == [0.0, 0.1, 1.0]
    assert line[0.1] == percent(result, "base", 16)
    assert line[1.0] == percent(result, "layer 4: gamma=1", 16)
    assert [axis.get_xscale() for axis in figure.axes] == ["linear", "log"] * 2


def test_parameters_without_effect_are_said_to_be() -> None:
    profile = make_profile((1, 4), values={"gamma": 0.0, "rho": 0.0})
    half = operator_variants(profile, {"gamma": (0.5,), "tau": (0.1,)})
    swept = operator_variants(make_profile((1, 4)), {"tau": (0.1,)})[:1]
    figure, data = operator_figure(study_result("operator", profile, [*half, *swept]))
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [[], [], [], ["without effect here"]]
    assert data["panels"][3]["lines"][0]["points"] == []


def test_alignment_sets_ce_off_apart() -> None:
    def variant(weight: float, gamma: float, on: bool = True) -> Variant:
        about = {"lambda_align": weight, "cross_entropy": on}
        profile = make_profile((0, 1, 2) if on else (1, 2, 4), values={"gamma": gamma})
        return Variant(f"lambda {weight:g}" if on else "CE off", profile, about)

    variants = [variant(0.5, 0.3), variant(0.0, 0.2), variant(0.1, 0.4, on=False)]
    result = study_result("alignment", make_profile(), variants)
    figure, data = alignment_figure(result)
    assert data["weights"] == [0.0, 0.5]
    assert [line["label"] for line in data["average"]] == [
        "retain 16",
        "retain 4",
        "retain 16, CE off",
        "retain 4, CE off",
    ]
    assert points(data["average"][0])[1] == percent(result, "lambda 0.5", 16)
    assert list(points(data["average"][3]).values()) == [percent(result, "CE off", 4)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "0.5", "CE off"]
    assert len(figure.axes) == 3


def test_robustness_shows_paired_points() -> None:
    profile = make_profile()
    result = study_result("robustness", profile, robustness_variants(profile))
    figure, data = robustness_figure(result)
    found = {point["layers"]: point for point in data["points"]["16"]}
    assert found["{1,2}"]["note"] == "reducer 3 removed"
    assert found["{1,2}"]["value"] == pytest.approx(percent(result, "{1,2}", 16) - percent(result, "base", 16))
    assert found["{1,2}"]["low"] <= found["{1,2}"]["value"] <= found["{1,2}"]["high"]
    assert "base" not in found
    assert len(figure.axes) == 2


def test_where_a_model_reads() -> None:
    """Of 24 questions with two answers each 12 + 2 layers are right behind a layer: half of 12 from layer 3 on."""
    variants = reading_variants(make_profile().model)

    def right(case: Case) -> int:
        return 24 if case.profile is None else 12 + 2 * case.profile.layers[0] + (case.profile.layers[0] == 3)

    study, header = Study("reading", tuple(variants)), {"model": "fake", "max_tokens": 8, "chance": {"average": 0.5}}
    made = run_study(study, [1], make_rows(), FakeAnswerer(right), header, None, lambda _: lambda _n: None)
    assert [case.get("kept") for case in made["cases"][1:]] == [[0]] * 5
    assert reading_depth(made) == 3
    figure, data = reading_figure(made)
    assert data["depth"] == 3
    assert [point["x"] for point in data["lines"][0]["points"]] == [0, 1, 2, 3, 4]
    assert len(figure.axes) == 1
    blind = {**made, "chance": {"average": 1.0}}
    with pytest.raises(EosError, match="take a model that reads its images"):
        reading_depth(blind)
    never = {**made, "cases": [case for case in made["cases"] if case.get("layer", 0) < 3]}
    assert reading_depth(never) == 3


def test_a_study_is_not_taken_for_another() -> None:
    profile = make_profile()
    result = study_result("robustness", profile, robustness_variants(profile))
    with pytest.raises(EosError, match="no study of placement"):
        placement_figure(result)
    with pytest.raises(EosError, match="no such kind"):
        placement_figure(study_result("placement", profile, placement_variants(profile)), "colour")


def test_margins_are_paired_differences() -> None:
    profile = make_profile()
    other = Variant("other", make_profile((0, 1, 2)))
    result = study_result("budgets", profile, [other])
    data = margin_figure(result, "base", "other")[1]
    assert points(data["points"][0]) == {
        budget: pytest.approx(percent(result, "base", budget) - percent(result, "other", budget)) for budget in (4, 16)
    }
    with pytest.raises(EosError, match="no such profile"):
        margin_figure(result, "base", "third")


def test_equivalence_shows_every_check_and_says_what_is_broken() -> None:
    checks = gaussian_checks((42, 43))
    assert [check["check"] for check in checks] == ["PRUNE", "MERGE", "POOL", "REWEIGHT", "BATCH"] * 2
    figure, data = equivalence_figure(checks)
    assert data["checks"] == checks
    assert "no bound broken" in figure.axes[0].get_title()
    worse = [*checks[:-1], {**checks[-1], "difference": 1.0, "ok": False}]
    assert "1 bound broken" in equivalence_figure(worse)[0].axes[0].get_title()


@pytest.fixture(scope="module")
def finished(small_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short search."""
    output = tmp_path_factory.mktemp("plots") / "run"
    settings = make_settings(small_path, output, steps=3, samples=4, batch_size=1, log_every=2)
    run_search(settings, quiet=True)
    return output


def test_the_trajectory_is_that_of_the_records(finished: Path) -> None:
    records = read_records(finished)
    figure, data = search_figure(records)
    assert data["steps"] == [0, 2]
    assert set(data["values"]) == set(KINDS)
    assert data["values"]["gamma"][1] == [records[0]["values"]["gamma"][1], records[2]["values"]["gamma"][1]]
    assert data["acting"] == records[2]["acting"]
    for place, kind in enumerate(("gate", "discard", "gamma", "tau")):
        assert [bar.get_height() for bar in figure.axes[place].patches] == records[2]["values"][kind]
        over_steps = figure.axes[4 + place].lines
        assert sorted(tuple(line.get_ydata()) for line in over_steps) == sorted(map(tuple, data["values"][kind]))
    with pytest.raises(EosError, match="no values of Theta"):
        trajectory([{"step": 0}])


def test_a_profiles_layers_see_what_is_kept() -> None:
    profile = make_profile()
    data = profile_figure(profile, [None, 4])[1]
    first, second, third = kept_counts(profile)
    assert data["tokens"]["6"]["by_layer"] == [36, 36, first, second, second, third]
    assert data["tokens"]["4"]["by_layer"][-1] == 4
    assert [operator["layer"] for operator in data["operators"]] == [1, 2, 4]


def test_kept_patches_are_the_references(small: tuple[Any, Any]) -> None:
    profile, image = make_profile(), sample_image(3, 24)
    kept = kept_patches(*small, profile, PROMPT, image, [None, 3, 36])
    reference = ReferenceModel(*small, profile)
    embeddings, (span,), _ = reference.embed(PROMPT, [image])
    state = reference.prefill(embeddings, [span], 3)
    visual = [[p - span.start for p in step.tolist() if span.start <= p < span.end] for step in state.kept]
    assert [list(step) for step in kept.by_budget[3]] == visual
    assert [len(step) for step in kept.by_budget[6]] == list(kept_counts(profile))
    assert set(kept.by_budget[3][2]) < set(kept.by_budget[3][1]) < set(kept.by_budget[3][0])
    assert kept.by_budget[36] == (tuple(range(36)),) * 3
    assert kept.side == 6
    assert kept.layers == (1, 2, 4)


def test_the_picture_is_what_the_model_sees(small: tuple[Any, Any]) -> None:
    image = sample_image(3, 24)
    seen = seen_picture(small[1], image)
    assert seen.shape == (24, 24, 3)
    assert np.abs(seen.astype(int) - np.asarray(image).astype(int)).max() <= 1
    wide = seen_picture(small[1], Image.new("RGB", (48, 24), (200, 10, 10)))
    assert wide.shape == (24, 24, 3)


def test_patches_that_are_gone_turn_pale() -> None:
    picture = np.full((12, 12, 3), 100, np.uint8)
    shaded = shade(picture, 3, [0, 5])
    left = (shaded == 100).all(axis=2)
    assert left.sum() == 2 * 16
    assert left[:4, :4].all()
    assert left[4:8, 8:].all()
    assert (shaded[~left] > 200).all()


def write(result: dict[str, Any], file: Path) -> str:
    """A raw result as a file."""
    file.write_text(json.dumps(result))
    return str(file)


def test_the_command_writes_a_png_and_its_data(
    finished: Path, small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = make_profile()
    theta = write(profile.to_dict(), tmp_path / "theta.json")
    placement = write(study_result("placement", profile, placement_variants(profile)), tmp_path / "p.json")
    budgets = write(study_result("budgets", profile, [Variant("other", make_profile((0, 1, 2)))]), tmp_path / "b.json")
    figures = {
        "placement": ["--raw", placement],
        "budgets": ["--raw", budgets],
        "margin": ["--raw", budgets, "--profile", "base", "--against", "other"],
        "search": ["--run", str(finished)],
        "profile": ["--profile", theta, "--budgets", "18,4"],
        "patches": ["--profile", theta, "--model", str(small_path), "--budgets", "9,4"],
    }
    for name, flags in figures.items():
        out = tmp_path / "figures" / f"{name}.png"
        assert main(["plot", name, *flags, "--out", str(out)]) == 0
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
        data = json.loads(out.with_suffix(".json").read_text())
        assert data["figure"] == name
        if "--raw" in flags:
            assert data["source"] == {"raw": Path(flags[1]).name}
        assert f"wrote {out} and {out.with_suffix('.json')}" in capsys.readouterr().out
        assert str(tmp_path) not in out.with_suffix(".json").read_text()
    first = (tmp_path / "figures" / "placement.png").read_bytes()
    assert main(["plot", "placement", "--raw", placement, "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == first
    assert json.loads((tmp_path / "figures" / "patches.json").read_text())["kept"].keys() == {"9", "4"}


def test_equivalence_takes_what_verify_prints(tmp_path: Path) -> None:
    check = {"check": "PRUNE", "difference": 0.0, "bound": 0.0, "note": "", "ok": True}
    raw = write({"ok": True, "seed": 7, "gaussian": [check], "hidden_states": [check]}, tmp_path / "verify.json")
    assert main(["plot", "equivalence", "--raw", raw, "--out", str(tmp_path / "e.png")]) == 0
    told = json.loads((tmp_path / "e.json").read_text())["checks"][-2:]
    assert [(c["seed"], c["tokens"]) for c in told] == [(7, "gaussian"), (7, "hidden states, relative")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["placement", "--raw", "no-such.json", "--out", "x.png"], "result='no-such.json': cannot be read"),
        (["equivalence", "--out", "x.pdf"], "is no PNG"),
        (["search", "--run", "no-such", "--out", "x.png"], "no values of Theta"),
        (["profile", "--profile", "no-such", "--out", "x.png"], "neither a file nor a shipped profile"),
        (["patches", "--profile", "embedded-eos", "--image", "x.png", "--out", "y.png"], "an image needs one"),
        (
            ["patches", "--profile", "embedded-eos", "--image", "x.png", "--question", "?", "--out", "y.png"],
            "--image='x.png': it cannot be read",
        ),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_results_without_cases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make_profile()
    empty = write(study_result("placement", profile, []) | {"cases": []}, tmp_path / "empty.json")
    assert main(["plot", "placement", "--raw", empty, "--out", str(tmp_path / "x.png")]) == 2
    assert "holds no case yet" in capsys.readouterr().err
    assert base_variant(profile).about == {"layers": [1, 2, 4]}
