"""Whether a benchmark discriminates: the verdict, the yardsticks before the decoder, and the command."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_search.discrimination import WITHOUT, selecting_profile, verdict, with_both_means, yardsticks
from eos_search.main import main
from eos_search.raw import read_result
from eos_search.reference import ReferenceModel
from eos_search.selection import selection_scores
from eos_vllm.cluttervqa import Row, make_sample
from eos_vllm.core.errors import EosError
from eos_vllm.core.importance import top_k
from eos_vllm.core.plan import Planner


def result(**replies):
    """A raw result of four questions, of which the last one is of counting; all are answered with yes."""
    kinds = ("reading", "reading", "relation", "counting")
    rows = [{"id": str(i), "kind": kind, "answer": "yes", "image": f"{i}.png"} for i, kind in enumerate(kinds)]
    share = {"value": 0.0, "low": 0.0, "high": 0.0, "questions": 1}
    accuracy = dict.fromkeys((*sorted(set(kinds)), "average"), share)
    cases = [
        {"profile": name, "budget": None if name == "none" else 64, "replies": told.split(), "accuracy": accuracy}
        for name, told in replies.items()
    ]
    return {"rows": rows, "cases": cases}


@pytest.mark.parametrize(
    ("uniform", "oracle", "right"),
    [
        ("no no yes no", "yes yes yes no", True),  # 50 points, and counting tells nothing
        ("yes yes yes no", "yes yes yes yes", False),
        ("no no no no", "no yes yes yes", False),
    ],
)
def test_the_verdict_is_of_the_mean_without_counting(uniform, oracle, right):
    found = verdict(result(none="yes yes yes yes", uniform=uniform, oracle=oracle))
    assert found.discriminates is right
    lost = [told.split()[:3] for told in (uniform, oracle)]
    wanted = [(2 - told[:2].count("yes")) / 4 + (1 - told[2:].count("yes")) / 2 for told in lost]
    assert [found.uniform.value, found.oracle.value] == pytest.approx(wanted)
    assert str(found).endswith("it discriminates" if right else "it does not discriminate")


def test_both_means_are_told():
    shown = with_both_means(result(none="yes yes no no"))["cases"][0]["accuracy"]
    assert list(shown)[-2:] == [WITHOUT, "average"]
    assert shown[WITHOUT]["value"] == pytest.approx(0.5)
    plain = result(none="yes yes no no")
    plain["rows"][3]["kind"] = "scene"
    assert WITHOUT not in with_both_means(plain)["cases"][0]["accuracy"]


def test_a_result_without_a_yardstick_is_refused():
    with pytest.raises(EosError, match="oracle, uniform"):
        verdict(result(none="yes yes yes yes"))


def test_the_uniform_yardstick_keeps_every_nth_patch_before_the_decoder():
    profile = selecting_profile(12, 576, 64)
    assert (profile.before is not None, profile.layers) == (True, ())
    assert Planner(profile).image_tokens(64) == 64
    with pytest.raises(EosError, match="--budget=576"):
        yardsticks(12, 576, 576)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 400))
def test_the_oracle_keeps_the_patches_that_a_question_needs(index):
    sample = make_sample("validation", index, version=2)
    for question in sample.questions:
        boxes = tuple(thing.box for thing in sample.scene.objects)
        needs = tuple(thing.box for thing in question.needs)
        row = Row("q", question.kind, "?", "yes", (Path("a.png"),), boxes, needs=needs)
        kept = set(top_k(selection_scores("oracle", row, 24, 336)[None], 64)[0].tolist())
        wanted = {24 * y + x for thing in question.needs for y, x in thing.patches}
        assert wanted <= kept
        if wanted:
            first = top_k(selection_scores("oracle", row, 24, 336)[None], len(wanted))[0]
            assert set(first.tolist()) == wanted


def test_given_scores_choose_what_enters_the_decoder(small):
    model, processor = small
    reference = ReferenceModel(model, processor, selecting_profile(6, 36, 9))
    sample = make_sample("test", 1, version=2)
    prompt = "USER: <image>\nWhich code is red? ASSISTANT:"
    scores = torch.rand(36, generator=torch.Generator().manual_seed(0))
    chosen, spans, _ = reference.embed(prompt, [sample.image], 9, scores)
    plain, (whole,), _ = ReferenceModel(model, processor, None).embed(prompt, [sample.image])
    assert [(span.start, span.length) for span in spans] == [(whole.start, 9)]
    wanted = plain[whole.start : whole.start + 36][top_k(scores[None], 9)[0]]
    torch.testing.assert_close(chosen[whole.start : whole.start + 9], wanted)
    evenly, _, _ = reference.embed(prompt, [sample.image], 9)
    assert not torch.equal(evenly, chosen)


def test_the_command_judges_and_keeps_what_it_measured(small_path, tmp_path, capsys):
    out = tmp_path / "raw.json"
    given = ["discriminates", "--model", str(small_path), "--budget", "9", "--out", str(out)]
    # Weights are random: nothing is known, so nothing can be lost.
    assert main([*given, "--images", "2", "--processes", "1"]) == 1
    said = capsys.readouterr().out
    assert "it does not discriminate" in said
    assert "| average without counting, exact | all | 9 |" in said
    raw = read_result(out)
    assert [case["profile"] for case in raw["cases"]] == ["none", "uniform", "oracle"]
    assert [case["kept"] for case in raw["cases"][1:]] == [[9], [9]]
    assert raw["benchmark"]["version"] == 2
    assert raw["cases"][1]["replies"] != raw["cases"][2]["replies"]
    assert main([*given, "--table", str(out)]) == 1
    assert capsys.readouterr().out == said
    more = [*given, "--images", "2", "--processes", "1", "--selectors", "mmr,coverage"]
    assert main(more) == 1
    assert "\n| mmr |  | " in capsys.readouterr().out
    assert [case["profile"] for case in read_result(out)["cases"]] == ["none", "uniform", "oracle", "mmr", "coverage"]
    assert main([*more[:-1], "typo"]) == 2
    assert "no selector has this name" in capsys.readouterr().err
    assert main([*given[:4], "36", *given[5:]]) == 2
    assert "--budget=36" in capsys.readouterr().err
    assert main(["discriminates", "--model", str(tmp_path)]) == 2
    assert "is no LLaVA's" in capsys.readouterr().err


def test_evaluations_of_version_2_tell_both_means(small_path, tmp_path, capsys):
    out = tmp_path / "raw.json"
    given = ["evaluate", "--model", str(small_path), "--benchmark-version", "2", "--images", "1", "--processes", "1"]
    assert main([*given, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"| {WITHOUT}, exact | all |" in said
    assert read_result(out)["benchmark"] == {"source": "ClutterVQA 2 test", "version": 2, "images": 1}
    assert WITHOUT not in read_result(out)["cases"][0]["accuracy"]
