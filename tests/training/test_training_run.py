"""A training run in small: it learns, stops, and goes on to the very same weights."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from stopped_run import CPU, goes_on_to_the_weights_of

from eos_search.training import train
from eos_search.training.__main__ import main
from eos_search.training.recipe import CLUTTER1, RECIPES, Part, Stage
from eos_search.training.train import Run, rate
from eos_vllm.core.errors import EosError

STAGES = (
    Stage("tower", 0, 3, 3e-3, 5e-4, (Part(2, 4, False),)),
    Stage("shallow", 4, 3, 1e-3, 5e-4, (Part(2, 2),)),
    Stage("full", 8, 4, 1e-3, 1e-5, (Part(2, 2), Part(2, 1, False)), 0.5),
)
RECIPE = replace(CLUTTER1, stages=STAGES)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {"mean": 0.0})


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = Run(tmp_path / "whole", CPU, 0, RECIPE)
    whole.train()
    monkeypatch.setattr(train, "_CHECKPOINT_EVERY", 2)
    goes_on_to_the_weights_of(whole, tmp_path / "broken", RECIPE)


def test_losses_fall(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_LOG_EVERY", 5)
    stages = (Stage("tower", 0, 40, 3e-3, 1e-3, (Part(2, 8, False),)),)
    Run(tmp_path, CPU, 0, replace(CLUTTER1, stages=stages)).train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["colour"] < 0.8 * log[0]["colour"]
    assert log[-1]["place"] < 0.5 * log[0]["place"]


def test_the_rate_warms_up_and_decays():
    stage = Stage("x", 8, 500, 1e-3, 1e-5, ())
    rates = [rate(stage, step) for step in range(500)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (59, 60)
    assert rates[0] < 2e-5
    assert rates[-1] == pytest.approx(1e-5, rel=0.05)
    assert all(a >= b for a, b in pairwise(rates[60:]))


def test_the_command_writes_the_model_and_its_record(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "clutter1", RECIPE)
    out, record = tmp_path / "model", tmp_path / "record.json"
    arguments = ["--out", str(out), "--work", str(tmp_path / "work"), "--record", str(record), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    assert main() == 0
    assert {file.name for file in out.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    data = json.loads(record.read_text())
    assert [stage["name"] for stage in data["stages"]] == ["tower", "shallow", "full"]
    assert data["resumed"] == []
    assert set(data["seconds"]) == {"tower", "shallow", "full"}
    assert data["provenance"]["seed"] == 0
    assert main() == 2  # the folder is not empty any more


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run = Run(tmp_path, CPU, 0, RECIPE)
    run.save()
    with pytest.raises(EosError, match="of other seed"):
        Run(tmp_path, CPU, 1, RECIPE).begin({})
    with pytest.raises(EosError, match="of other stages"):
        Run(tmp_path, CPU, 0, replace(RECIPE, stages=STAGES[:2])).begin({})
    run.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(EosError, match="cannot be gone on from"):
        Run(tmp_path, CPU, 0, RECIPE).begin({})


def test_the_log_of_steps_that_are_done_again_is_dropped(tmp_path):
    run = Run(tmp_path, CPU, 0, RECIPE)
    run.stage, run.step = 1, 2
    run.save()
    records = [{"stage": "tower", "step": 3}, {"stage": "shallow", "step": 2}, {"stage": "shallow", "step": 3}]
    run.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    again = Run(tmp_path, CPU, 0, RECIPE)
    again.begin({})
    assert [json.loads(line) for line in again.log.read_text().splitlines()] == records[:2]


def test_an_unknown_device_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "--out", str(tmp_path / "m"), "--device", "nothing"])
    assert main() == 2
    assert "--device='nothing'" in capsys.readouterr().err
