"""The choice among measured points: cheapest, monotone, honest about what it rests on; the data against raw results."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli_runs import output, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import choices as condenser
from benchmarks.equal_cost import table
from eos_vllm import profiles
from eos_vllm.analysis.advice import GIB, Advice, Wish
from eos_vllm.analysis.advise import Catalogue, requests_fit
from eos_vllm.analysis.choices import FILE, acts, choices, parse_choices
from eos_vllm.analysis.comparison import compare
from eos_vllm.cli.advise import model_sizes
from eos_vllm.cli.main import main
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import read_profile
from eos_vllm.models import embedded

ROOT = Path(__file__).parents[2]


@cache
def catalogue(model: str = "embedded") -> Catalogue:
    return Catalogue(choices(), model_sizes(model), model)


def wish(**changes: Any) -> Wish:
    return Wish(**{"kv_gib": 1.0, "concurrency": 64, "accuracy_floor": 0.95, "output_tokens": 256, **changes})


@pytest.fixture(scope="module")
def condensed() -> str:
    return condenser.condense(ROOT)


def test_the_committed_data_is_what_the_command_makes(condensed: str) -> None:
    assert FILE.read_text() == condensed, "make choices"


def test_the_points_are_those_of_the_published_table(condensed: str) -> None:
    """The table of docs/equal-cost.md, drawn by other code from the same raw result."""
    raw = json.loads((ROOT / condenser.EQUAL_COST).read_text())
    rows = {line.split(" | ")[0].strip("| "): line for line in reversed(table(raw).splitlines()) if ";" in line}
    points = [p for p in parse_choices(condensed).points if p.source == condenser.EQUAL_COST]
    assert len(points) == len(raw["cases"]) - 1
    for point in points:
        a = point.accuracy
        cell = f"{100 * a.mean:.1f} ({100 * a.low:.1f} to {100 * a.high:.1f}); {point.stock_ratio:.2f}x"
        assert cell in rows[point.profile]


def test_a_profile_that_does_something_else_today_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = condenser.all_profiles()
    # The same counts by another rule.
    monkeypatch.setattr(condenser, "all_profiles", lambda: known | {"mmr": known["maxmin"]})
    with pytest.raises(EosError, match="does something else today"):
        condenser.condense(ROOT)


def test_every_point_is_its_profile_at_its_budget() -> None:
    for point in choices().points:
        profile = choices().profile(point)
        assert Planner(profile).counts(point.budget) == point.counts
        assert point.kv_share == pytest.approx(point.layer_average / 576, abs=1e-6)
        if point.shipped is not None:
            assert acts(profiles.load(point.shipped)) == acts(profile)
            assert Planner(profiles.load(point.shipped)).counts(point.budget) == point.counts


@pytest.mark.parametrize("model", ["embedded", "llava-1.5-7b"])
@pytest.mark.parametrize("floor", [0.5, 0.9, 0.95])
def test_the_choice_is_the_cheapest_that_will_do(model: str, floor: float) -> None:
    """Against a plain search over all points."""
    wanted = wish(kv_gib=40.0, accuracy_floor=floor)
    advice = catalogue(model).advise(wanted)
    assert advice.choice is not None
    held = []
    for planned in catalogue(model).planned:
        if planned.point.relative.low >= floor:
            costs = compare(catalogue(model).geometry, planned.planner, 88 + 256, 1).reduced
            held.append(costs.allocated_bytes)
            assert requests_fit(40.0, costs) >= 64
    assert advice.choice.kv_bytes == min(held)
    assert advice.choice.relative.low >= floor
    assert advice.choice.requests_fit == (40 * GIB - 1) // advice.choice.kv_bytes  # 40 GiB is no multiple of it


WISHES = st.builds(
    wish,
    kv_gib=st.floats(0.001, 50),
    concurrency=st.integers(1, 2000),
    accuracy_floor=st.floats(0.2, 1.0),
    text_tokens=st.integers(0, 3000),
    output_tokens=st.integers(0, 3000),
    images=st.integers(1, 4),
    by=st.sampled_from(["low", "mean"]),
)


@settings(deadline=None, max_examples=60)
@given(wanted=WISHES, lower=st.floats(0.01, 1.0), model=st.sampled_from(["embedded", "llava-1.5-7b"]))
def test_a_lower_floor_never_gives_a_costlier_choice(wanted: Wish, lower: float, model: str) -> None:
    strict = catalogue(model).advise(wanted)
    easy = catalogue(model).advise(replace(wanted, accuracy_floor=min(lower, wanted.accuracy_floor)))
    if strict.choice is not None:
        assert easy.choice is not None
        assert easy.choice.kv_bytes <= strict.choice.kv_bytes
        # Not more than before, to the request: blocks of unlike size leave unlike remainders.
        assert min(easy.choice.requests_fit, strict.choice.requests_fit) >= wanted.concurrency


@settings(deadline=None, max_examples=60)
@given(wanted=WISHES, more=st.floats(1, 4), model=st.sampled_from(["embedded", "llava-1.5-7b"]))
def test_more_memory_or_fewer_requests_never_lose_a_choice(wanted: Wish, more: float, model: str) -> None:
    first = catalogue(model).advise(wanted)
    larger = catalogue(model).advise(replace(wanted, kv_gib=wanted.kv_gib * more))
    fewer = catalogue(model).advise(replace(wanted, concurrency=max(1, int(wanted.concurrency / more))))
    if first.choice is not None:
        assert larger.choice is not None
        assert fewer.choice is not None
        assert larger.choice.kv_bytes <= first.choice.kv_bytes
        assert fewer.choice.kv_bytes <= first.choice.kv_bytes
    else:
        assert first.misses
        assert first.nearest is not None


def test_what_misses_is_said() -> None:
    def missed(**changes: Any) -> Advice:
        advice = catalogue("llava-1.5-7b").advise(wish(kv_gib=40.0, **changes))
        assert advice.choice is None
        return advice

    accurate = missed(accuracy_floor=0.995)
    assert accurate.nearest is not None
    assert [line.split(":")[0] for line in accurate.misses] == ["accuracy"]
    assert f"{max(p.relative.low for p in choices().points):.4g}" in accurate.misses[0]
    many = missed(concurrency=5000)
    assert many.nearest is not None
    assert [line.split(":")[0] for line in many.misses] == ["memory"]
    assert f"{many.nearest.requests_fit} requests fit" in many.misses[0]
    assert [line.split(":")[0] for line in missed(accuracy_floor=0.995, concurrency=5000).misses] == [
        "accuracy",
        "memory",
    ]


def test_another_model_is_told_loudly_and_no_speed_is_carried_over(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["advise", "--kv-gib", "40", "--concurrency", "64", "--accuracy-floor", "0.9"]
    here = output(capsys, *asked)
    there = output(capsys, *asked, "--model", "llava-1.5-7b")
    assert "not on llava-1.5-7b: what llava-1.5-7b answers, nobody has measured" in there.splitlines()[0]
    assert "scaled to 32 layers" in there
    assert "nobody has measured" not in here
    assert "measured: embedded in offline vLLM" in there
    assert "nobody has measured" not in output(capsys, *asked, "--model", str(embedded.path()))
    unknown = output(capsys, *asked[:-1], "0.95", "--model", "llava-1.5-7b")
    assert "speed      not measured at this point, and not guessed" in unknown


def test_the_mean_is_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    low, mean = (catalogue().advise(wish(by=by)).choice for by in ("low", "mean"))
    assert low is not None
    assert mean is not None
    assert mean.kv_bytes < low.kv_bytes
    assert mean.relative.low < 0.95 <= mean.relative.mean
    shown = output(capsys, "advise", "--kv-gib", "1", "--concurrency", "64", "--accuracy-floor", "0.95", "--by", "mean")
    assert "by the mean" in shown


def test_a_choice_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theta.json"
    asked = ["advise", "--kv-gib", "40", "--concurrency", "64", "--accuracy-floor", "0.9", "--model", "llava-1.5-7b"]
    shown = output(capsys, *asked, "--save", str(file))
    option = catalogue("llava-1.5-7b").advise(wish(kv_gib=40.0, accuracy_floor=0.9)).choice
    assert option is not None
    assert f"--eos-profile {file} --eos-retain {option.budget}" in shown
    saved = read_profile(file)
    assert saved.model.num_decoder_layers == 32
    assert list(Planner(saved).counts(option.budget)) == option.counts
    assert "cannot be written" in refusal(capsys, *asked, "--save", str(file))


@pytest.mark.parametrize(
    ("profile", "flag"), [("embedded-fastv", True), ("embedded-searched", True), ("embedded-divprune", False)]
)
def test_counts_are_served_as_they_were_measured(profile: str, flag: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Reducers inside the decoder are rounded to blocks unless told otherwise; one before it alone never is."""
    asked = ["--kv-gib", "1", "--concurrency", "64", "--accuracy-floor", "0.82", "--profile", profile]
    shown = output(capsys, "advise", *asked)
    option = catalogue().advise(wish(accuracy_floor=0.82, profiles=(profile,))).choice
    assert option is not None
    assert option.rounds is flag
    served = f"--eos-profile {option.shipped} --eos-retain {option.budget}"
    assert (f"{served} --eos-exact-counts" in shown) is (flag and option.shipped is not None)
    assert (served in shown) is (option.shipped is not None)


def test_one_profile_at_a_time() -> None:
    found = catalogue().advise(wish(accuracy_floor=0.8, profiles=("embedded-divprune",))).choice
    assert found is not None
    assert (found.profile, found.shipped) == ("maxmin", "embedded-divprune")
    with pytest.raises(SettingError, match="nothing was measured of it"):
        catalogue().advise(wish(profiles=("nope",)))


def test_no_choice_ends_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--kv-gib", "0.001", "--concurrency", "64", "--accuracy-floor", "0.9"]) == 1
    assert "misses     memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_gib", 0.0),
        ("kv_gib", float("nan")),
        ("kv_gib", float("inf")),
        ("accuracy_floor", 0.0),
        ("accuracy_floor", 95.0),
        ("accuracy_floor", float("nan")),
        ("concurrency", 0),
        ("text_tokens", -1),
        ("output_tokens", 1 << 40),
        ("images", 0),
    ],
)
def test_a_wrong_wish_is_one_line(field: str, value: float) -> None:
    with pytest.raises(SettingError, match="give "):
        wish(**{field: value})
