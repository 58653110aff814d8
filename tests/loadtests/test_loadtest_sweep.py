"""The sweep: what it measures, that it resumes, and what it refuses; servers and locust are made up."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import Runs, arrange, command, setting_of

from eos_vllm.core.errors import EosError, SettingError
from loadtests import sweep
from loadtests.cell import LocustError
from loadtests.figures import Cell
from loadtests.store import Store
from loadtests.subjects import fitted_profile, pool_bytes, speed_subject
from loadtests.sweep_options import SweepOptions

CELLS = 3 + 2 * 2 * 2 * 3  # accuracy; two sizes of KV cache, two repeats, two loads; stock and two budgets


@pytest.fixture(autouse=True)
def _signals() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_every_cell_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    assert sweep.main(command(tmp_path / "out", model)) == 0
    store = Store(tmp_path / "out")
    cells = store.cells()
    assert len(cells) == CELLS
    assert sorted(cell["key"] for cell in cells) == sorted(runs.measured)
    # Each phase warms up both servers.
    assert len(runs.workloads) == CELLS + 3 * 2
    raw = json.dumps([store.sweep(), cells])
    assert str(tmp_path) not in raw
    assert "127.0.0.1" not in raw
    read = [Cell.from_dict(cell) for cell in cells]
    assert {len(cell.records) for cell in read if cell.phase != "accuracy"} == {3, 12}


def test_settings_of_a_repeat_ask_the_same_with_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    sweep.main(command(tmp_path / "out", model, "--no-accuracy"))
    seeds: dict[Any, set[int]] = {}
    for workload in runs.workloads:
        seeds.setdefault(setting_of(workload), set()).add(workload.seed)
    assert seeds["stock"] == seeds[64] == seeds[576] == {1, 2}
    labels = [workload.label for workload in runs.workloads]
    assert len(set(labels)) == len(labels)


def test_stopped_sweep_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = Runs(stop_after=9)
    model = arrange(monkeypatch, tmp_path, first)
    assert sweep.main(command(out, model)) == 130
    done = {cell["key"] for cell in Store(out).cells()}
    assert done == set(first.measured)
    second = Runs()
    arrange(monkeypatch, tmp_path, second)
    assert sweep.main(command(out, model)) == 0
    assert not done & set(second.measured)
    assert len(done) + len(second.measured) == CELLS == len(Store(out).cells())
    assert len(Store(out).sweep()["sessions"]) == 2
    third = Runs()
    arrange(monkeypatch, tmp_path, third)
    assert sweep.main(command(out, model)) == 0
    assert third.workloads == []


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


def test_repeats_that_no_time_is_left_for_are_left_out_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    model = arrange(monkeypatch, tmp_path, runs)
    assert sweep.main(command(tmp_path / "out", model, "--minutes", "0.00001")) == 0
    assert {cell["repeat"] for cell in Store(tmp_path / "out").cells()} == {1}
    left_out = Store(tmp_path / "out").sweep()["sessions"][-1]["left_out"]
    assert set(left_out) == {"large", "bound"}
    assert "repeats 2 to 2" in left_out["large"]


def test_without_the_embedded_model_accuracy_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())

    def missing(_: Any) -> Any:
        raise EosError("model", "embedded", "is not in this installation", "make it")

    monkeypatch.setattr(sweep, "accuracy_subject", missing)
    assert sweep.main(command(tmp_path / "out", model)) == 0
    found = Store(tmp_path / "out").sweep()
    assert [phase["name"] for phase in found["settings"]["phases"]] == ["large", "bound"]
    assert "not in this installation" in found["sessions"][0]["left_out"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--repeats", "0"], "repeats"),
        (["--minutes", "0"], "minutes"),
        (["--kv", "huge"], "kv"),
        (["--kv", ""], "kv"),
        (["--bound-requests", "0.5"], "bound_requests"),
        (["--dtype", "int3"], "dtype"),
        (["--stock-url", "http://x:1"], "stock-url"),
        (["--stock-url", "http://x:1", "--eos-url", "http://x:2"], "served-name"),
        (["--repeat-share", "2"], "repeat_share"),
        (["--scenarios", "two_images=1"], "max-model-len"),
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


def test_bound_pool_holds_the_requests_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    options = SweepOptions(tmp_path, model=str(model), profile="embedded-eos", bound_requests=3.5)
    subject = speed_subject(options, tmp_path)
    # 664 + 16 tokens in blocks of 32, over 8 layers of 2 key heads of 32 in float32.
    block = 32 * 8 * 2 * 2 * 32 * 4
    assert pool_bytes(options, "bound", subject) == (77 + 1) * block
    assert pool_bytes(options, "large", subject) == (24 * 22 * 5 // 4 + 1) * block
    chosen = SweepOptions(tmp_path, model=str(model), profile="embedded-eos", kv_bytes={"large": 12345})
    assert pool_bytes(chosen, "large", subject) == 12345


def test_profiles_are_scaled_to_the_model_and_reach_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = arrange(monkeypatch, tmp_path, Runs())
    options = SweepOptions(tmp_path, model=str(model))
    subject = speed_subject(options, tmp_path)
    assert subject.profile is not None
    assert subject.profile.model.num_decoder_layers == 8
    assert subject.profile.budget.measure == "final"
    with pytest.raises(EosError):
        fitted_profile("no-such-profile", subject.sizes)  # type: ignore[arg-type]


def test_given_servers_can_be_held_against_a_published_shape(tmp_path: Path) -> None:
    options = SweepOptions(
        tmp_path, stock_url="http://a", eos_url="http://b", served_name="llava", model="llava-1.5-7b", dtype="float16"
    )
    subject = speed_subject(options, tmp_path)
    assert subject.sizes is not None
    assert subject.profile is not None
    assert (subject.sizes.num_decoder_layers, subject.profile.model.num_decoder_layers) == (32, 32)
    assert [phase.name for phase in options.phases()] == ["given"]


def test_options_refuse_single_servers() -> None:
    with pytest.raises(SettingError):
        SweepOptions(Path(), eos_url="http://x")
