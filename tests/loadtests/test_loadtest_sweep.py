"""The sweep: what it measures, repeats and resumes, and what it refuses; servers and locust are made up."""

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import SECONDS, Runs, arrange, command, made_up, setting_of

from eos_vllm.core.errors import EosError, SettingError
from loadtests import sweep
from loadtests.cell import LocustError
from loadtests.grid import Load
from loadtests.results import Results
from loadtests.store import Store
from loadtests.subjects import fitted_profile, pool_bytes, profile_title, speed_subject
from loadtests.sweep_options import SweepOptions

CELLS = 2 * 2 * 3  # scenarios, loads; stock and two budgets
# 576 is close to stock everywhere, 64 nowhere: both of a pair again, four times.
AGAIN = 2 * 2 * 2 * 4


def test_every_cell_is_measured_and_close_ones_five_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    assert sweep.main(command(tmp_path / "out", model)) == 0
    store = Store(tmp_path / "out")
    cells = store.cells()
    assert sorted(cell["key"] for cell in cells) == sorted(runs.measured)
    assert len(cells) == CELLS + AGAIN
    repeats = {(c["scenario"], c["setting"], c["load"]["concurrency"]): 0 for c in cells}
    for cell in cells:
        repeats[cell["scenario"], cell["setting"], cell["load"]["concurrency"]] += 1
    assert {setting: n for (_, setting, _), n in repeats.items()} == {"stock": 5, "576": 5, "64": 1}
    raw = json.dumps([store.sweep(), cells])
    assert str(tmp_path) not in raw
    assert "127.0.0.1" not in raw


def test_settings_take_turns_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    sweep.main(command(tmp_path / "out", model, "--scenarios", "single", "--concurrency", "8"))
    turns = [str(setting_of(workload)) for workload in runs.workloads]
    assert turns == ["stock", "576", "64", "576", "stock", "stock", "576", "576", "stock", "stock", "576"]


def test_clearly_slower_settings_are_not_repeated_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(run=lambda workload: made_up(workload, SECONDS | {576: 4.0}))
    model = arrange(monkeypatch, tmp_path, runs)
    sweep.main(command(tmp_path / "out", model, "--scenarios", "single", "--concurrency", "8"))
    assert [setting_of(w) for w in runs.workloads].count(576) == 3


def test_both_servers_are_warmed_up_at_every_budget_for_every_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    sweep.main(command(tmp_path / "out", model))
    assert runs.warmed == [(setting, ("single", "multi_turn")) for setting in ("stock", 576, 64)]


def test_settings_of_a_repeat_ask_the_same_with_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    sweep.main(command(tmp_path / "out", model, "--repeats", "2", "--repeats-close", "1"))
    seeds: dict[Any, set[int]] = {}
    for workload in runs.workloads:
        seeds.setdefault(setting_of(workload), set()).add(workload.seed)
    assert seeds["stock"] == seeds[64] == seeds[576] == {1, 2}
    labels = [workload.label for workload in runs.workloads]
    assert len(set(labels)) == len(labels)


def test_stopped_sweep_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = Runs(stop_after=CELLS + 5)
    model = arrange(monkeypatch, tmp_path, first)
    assert sweep.main(command(out, model)) == 130
    done = {cell["key"] for cell in Store(out).cells()}
    assert done == set(first.measured)
    second = Runs()
    arrange(monkeypatch, tmp_path, second)
    assert sweep.main(command(out, model)) == 0
    assert not done & set(second.measured)
    assert len(done) + len(second.measured) == CELLS + AGAIN == len(Store(out).cells())
    assert len(Store(out).sweep()["sessions"]) == 2
    third = Runs()
    arrange(monkeypatch, tmp_path, third)
    assert sweep.main(command(out, model)) == 0
    assert third.workloads == []


def test_more_scenarios_go_on_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, once = tmp_path / "out", ("--repeats-close", "1")
    model = arrange(monkeypatch, tmp_path, Runs())
    sweep.main(command(out, model, *once, "--scenarios", "single"))
    more = Runs()
    arrange(monkeypatch, tmp_path, more)
    assert sweep.main(command(out, model, *once, "--scenarios", "single,several")) == 0
    assert {label.split("/")[0] for label in more.measured} == {"several"}


def test_other_settings_do_not_mix_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = arrange(monkeypatch, tmp_path, Runs(stop_after=3))
    sweep.main(command(tmp_path / "out", model))
    assert sweep.main(command(tmp_path / "out", model, "--output-tokens", "32")) == 2
    assert "other settings (output_tokens)" in capsys.readouterr().err


def test_failed_run_is_told_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> Any:
        raise LocustError("locust ended with code 1")

    model = arrange(monkeypatch, tmp_path, Runs(run=fail))
    assert sweep.main(command(tmp_path / "out", model)) == 1
    assert "goes on from here" in capsys.readouterr().err
    assert Store(tmp_path / "out").cells() == []


def test_a_run_without_an_answer_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from load_builders import cell_run, record

    model = arrange(monkeypatch, tmp_path, Runs(run=lambda _: cell_run([record(cause="no connection")])))
    assert sweep.main(command(tmp_path / "out", model)) == 1
    assert "no request was answered (no connection)" in capsys.readouterr().err
    assert Store(tmp_path / "out").cells() == []


def test_repeats_that_no_time_is_left_for_are_left_out_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    assert sweep.main(command(tmp_path / "out", model, "--minutes", "0.00001")) == 0
    assert {cell["repeat"] for cell in Store(tmp_path / "out").cells()} == {1}
    assert "repeats from 2 on" in Store(tmp_path / "out").sweep()["sessions"][-1]["left_out"]
    assert not [c for c in Results(tmp_path / "out").comparisons if c.ratio.verdict == "no difference"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--repeats", "0"], "repeats"),
        (["--minutes", "0"], "minutes"),
        (["--seconds", "0"], "seconds"),
        (["--window-most", "1"], "window_most"),
        (["--dtype", "int3"], "dtype"),
        (["--kv-bytes", "0"], "kv_bytes"),
        (["--budgets", "64,64"], "budgets"),
        (["--concurrency", "0"], "concurrency"),
        (["--rates", "fast"], "rates"),
        (["--stock-url", "http://x:1"], "eos-url"),
        (["--stock-url", "http://x:1", "--eos-url", "http://x:2"], "served-name"),
        (["--restricted", "--stock-url", "http://x:1", "--eos-url", "http://x:2", "--served-name", "m"], "restricted"),
        (["--scenarios", "none"], "scenarios"),
        (["--scenarios", "long_text", "--max-model-len", "1024"], "max-model-len"),
        (["--profile", "no-such-profile"], "profile"),
    ],
)
def test_refused(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    assert sweep.main([*command(tmp_path / "out", model), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: {named}=" in error


def test_pool_has_room_for_every_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    options = SweepOptions(tmp_path, model=str(model), profile="embedded-eos", loads=(Load(1), Load(3)))
    sizes = speed_subject(options, tmp_path).sizes
    assert sizes is not None
    # Keys and values of 8 layers of 2 heads of 32 in float32.
    assert pool_bytes(options, sizes) == 8 * 2 * 2 * 32 * 4 * (3 * 2048 + 256)
    chosen = SweepOptions(tmp_path, model=str(model), profile="embedded-eos", kv_bytes=12345)
    assert pool_bytes(chosen, sizes) == 12345


def test_windows_hold_whole_visits_of_few_users_and_a_share_of_many() -> None:
    options = SweepOptions(Path())
    found = [options.window_requests("single", Load(users)) for users in (1, 8, 24)]
    assert found == [3, 8, 12]
    assert [options.window_requests("multi_turn", Load(users)) for users in (1, 8, 24)] == [3, 24, 36]


def test_profiles_are_scaled_to_the_model_and_reach_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    subject = speed_subject(SweepOptions(tmp_path, model=str(model)), tmp_path)
    assert subject.profile is not None
    assert subject.profile.model.num_decoder_layers == 8
    assert subject.profile.budget.measure == "final"
    assert subject.profile_name == "sparsevlm-v2-llava-1.5-7b, scaled from 32 to 8 layers"
    assert subject.sizes is not None
    assert profile_title("embedded-eos", fitted_profile("embedded-eos", subject.sizes)) == "embedded-eos"
    with pytest.raises(EosError):
        fitted_profile("no-such-profile", subject.sizes)


def test_options_refuse_single_servers() -> None:
    with pytest.raises(SettingError):
        SweepOptions(Path(), eos_url="http://x")
