"""Gates that stay undecided: their temperature and learning rate, where they start, and restarts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from search_cases import kill_at, make_rules, make_settings, make_theta

from eos_search.loop import Trainer
from eos_search.main import main
from eos_search.objective import Objective
from eos_search.restarts import run_restarts
from eos_search.run import SearchResult, run_search
from eos_search.run_folder import RESTARTS, read_records
from eos_search.spent import seconds_of
from eos_search.starts import parse_placements
from eos_search.theta import KINDS
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import read_profile

SOFT: dict[str, Any] = {"gate_scale_start": 1.0, "gate_on": 0.6, "gate_off": 0.4, "gate_rate": 0.1}


def test_the_temperature_rises_by_equal_factors_and_then_stays(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, tmp_path, steps=9, gate_scale_start=1.0, gate_scale=16.0, gate_settled=0.5)
    theta = make_theta({1: 0.5})
    trainer = Trainer(theta, make_rules(), Objective(6, 3, 36, ()), settings, Accelerator())
    seen = []
    for _ in range(9):
        trainer.temper()
        seen.append(theta.gate_scale)
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert seen == pytest.approx([1, 2, 4, 8, 16, 16, 16, 16, 16])
    assert seen[4:] == [16.0] * 5


def test_gates_start_where_they_are_told_and_harden(small_path: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the schedule alone moves them: logits grow with Tg."""
    settings = make_settings(small_path, tmp_path / "run", learning_rate=1e-9, log_every=1, **SOFT)
    result = run_search(settings, quiet=True)
    gates = [record["values"]["gate"] for record in result.records]
    # C = 3, of which three gates at 0.6 leave 1.2 for two others: no more than 0.4 each.
    assert gates[0] == pytest.approx([0.4, 0.6, 0.6, 0.4, 0.6, 0.0])
    assert result.records[0]["counts"] == [19, 10, 5]
    sharp = 1 / (1 + math.exp(-5 * math.log(0.6 / 0.4)))
    assert gates[-1][1] == pytest.approx(sharp, abs=1e-6)
    assert gates[-1][0] == pytest.approx(1 - sharp, abs=1e-6)
    assert result.profile.reducers[0].gate == pytest.approx(sharp, abs=1e-6)


def test_a_schedule_goes_on_where_it_was(small_path: Path, tmp_path: Path) -> None:
    whole = run_search(make_settings(small_path, tmp_path / "whole", **SOFT), quiet=True)
    settings = make_settings(small_path, tmp_path / "run", **SOFT)
    kill_at(3, settings)
    assert run_search(settings, resume=True, quiet=True).records == whole.records
    assert (tmp_path / "run/theta.json").read_bytes() == whole.path.read_bytes()


def test_gates_move_at_their_own_rate(small_path: Path, tmp_path: Path) -> None:
    """Of the first step that moves anything; there is no clipping that would tie kinds together."""
    moved = {}
    for rate in (1.0, 0.1):
        output = tmp_path / str(rate)
        run_search(make_settings(small_path, output, gate_rate=rate, steps=2, log_every=1, warmup=0), quiet=True)
        first, second = (record["values"] for record in read_records(output))
        moved[rate] = {kind: (first[kind][1], second[kind][1]) for kind in KINDS}

    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    def step(rate: float, kind: str) -> float:
        before, after = moved[rate][kind]
        return logit(after) - logit(before)

    assert step(0.1, "gate") == pytest.approx(0.1 * step(1.0, "gate"), rel=1e-6)
    assert step(0.1, "gamma") == pytest.approx(step(1.0, "gamma"), rel=1e-9)


def test_gates_on_the_wrong_side_are_refused(small_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"gate_on=0.45: gate_off=0.05 < gate_threshold=0.5 < gate_on"):
        run_search(make_settings(small_path, tmp_path / "run", gate_on=0.45), quiet=True)


def test_placements_are_read() -> None:
    assert parse_placements("0,1,3;2") == [(0, 1, 3), (2,)]
    for wrong in ("0,1", "0,1;0,1", "a;b", ""):
        with pytest.raises(SettingError, match="no placements"):
            parse_placements(wrong)


def test_the_best_end_of_several_starts_is_taken(
    small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "config.json", tmp_path / "runs"
    config.write_text(json.dumps(make_settings(small_path, output, steps=3).to_dict()))
    argv = ["run", "--config", str(config), "--restarts", "0,1,2;2,3,4", "--quiet"]
    assert main(argv) == 0
    told = json.loads((output / RESTARTS).read_text())
    assert [end["placement"] for end in told["searches"]] == [[0, 1, 2], [2, 3, 4]]
    losses = {end["folder"]: end["final"]["loss"] for end in told["searches"]}
    assert told["best"] == min(losses, key=lambda name: losses[name])
    for name, loss in losses.items():
        records = read_records(output / name)
        assert loss == pytest.approx(sum(record["terms"]["loss"] for record in records) / 3)
    assert (output / "theta.json").read_bytes() == (output / told["best"] / "theta.json").read_bytes()
    before = {file: file.stat().st_mtime_ns for file in output.rglob("start-*/theta.json")}
    assert main([*argv, "--resume"]) == 0
    assert {file: file.stat().st_mtime_ns for file in output.rglob("start-*/theta.json")} == before
    assert main(argv) == 2
    assert "it holds a search already" in capsys.readouterr().err
    assert json.loads((output / RESTARTS).read_text()) == told, "what ended is still told"


def test_a_race_leaves_the_best_third_to_go_on(small_path: Path, tmp_path: Path) -> None:
    """It ends in the bytes that it would have had alone, and is the same however often it was stopped."""
    steps: list[tuple[str, bool]] = []

    def search(settings: Any, resume: bool, **others: Any) -> SearchResult:
        steps.append((settings.output.name, resume))
        return run_search(settings, resume=resume, **others)

    starts = [{"placement": placement} for placement in ((0, 1), (1, 2), (2, 3), (3, 4))]
    settings = make_settings(small_path, tmp_path / "runs", steps=4, checkpoint_every=3)
    result = run_restarts(settings, starts, quiet=True, race=2, search=search)
    told = json.loads((tmp_path / "runs" / RESTARTS).read_text())
    losses = {
        end["folder"]: sum(r["terms"]["loss"] for r in read_records(tmp_path / "runs" / end["folder"])[:2]) / 2
        for end in told["searches"]
    }
    ahead = sorted(losses, key=lambda name: losses[name])[:2]
    assert [end["folder"] for end in told["searches"] if "final" in end] == [n for n in losses if n in ahead]
    for end in told["searches"]:
        assert len(read_records(tmp_path / "runs" / end["folder"])) == (4 if "final" in end else 2)
        assert "final" in end or (end["steps"], end["left"]["loss"]) == (2, pytest.approx(losses[end["folder"]]))
    assert steps == [(name, False) for name in losses] + [(name, True) for name in losses if name in ahead]
    assert seconds_of(tmp_path / "runs") > 0
    placement = next(end["placement"] for end in told["searches"] if end["folder"] == told["best"])
    run_search(make_settings(small_path, tmp_path / "alone", steps=4, placement=tuple(placement)), quiet=True)
    theirs = json.loads((tmp_path / "alone/theta.json").read_text())
    ours = json.loads((tmp_path / "runs/theta.json").read_text())
    assert theirs["reducers"] == ours["reducers"]
    del steps[:]
    assert run_restarts(settings, starts, resume=True, quiet=True, race=2, search=search).profile == result.profile
    assert not steps
    with pytest.raises(SettingError, match=r"race=None: the searches in .* have 2"):
        run_restarts(settings, starts, resume=True, quiet=True, search=search)
    with pytest.raises(SettingError, match="race=4: a search has 4 steps"):
        run_restarts(make_settings(small_path, tmp_path / "other", steps=4), starts, race=4)


def test_a_start_that_ends_without_reducers_is_told(small_path: Path, tmp_path: Path) -> None:
    finished = run_search(make_settings(small_path, tmp_path / "one", steps=1), quiet=True)

    def search(settings: Any, resume: bool, quiet: bool) -> SearchResult:
        if settings.placement == (0,):
            raise SettingError("gate_threshold", 0.5, "no layer reduces", "raise lambda_budget")
        return finished

    (tmp_path / "runs").mkdir()
    settings = make_settings(small_path, tmp_path / "runs")
    result = run_restarts(settings, [{"placement": (0,)}, {"placement": (1,)}], search=search)
    assert result.profile == read_profile(tmp_path / "runs/theta.json")
    told = json.loads((tmp_path / "runs" / RESTARTS).read_text())
    assert told["searches"][0]["failed"].startswith("gate_threshold=0.5")
    with pytest.raises(SettingError, match="restarts=1: no search ended"):
        run_restarts(make_settings(small_path, tmp_path / "none"), [{"placement": (0,)}], search=search)
    told = json.loads((tmp_path / "none" / RESTARTS).read_text())
    assert told["best"] is None
    assert told["searches"][0]["failed"].startswith("gate_threshold=0.5")
