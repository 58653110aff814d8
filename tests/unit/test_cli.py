"""The command line through ``main``: what is printed, exit codes, and that a mistake never ends in a traceback."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import V2, output, refusal

from eos_vllm import __version__, profiles
from eos_vllm.analysis import equivalence
from eos_vllm.analysis.equivalence import corner_checks
from eos_vllm.cli import verify
from eos_vllm.cli.main import COMMANDS, build_parser, main
from eos_vllm.models.tiny import write_tiny_model


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"eos-vllm {__version__}\n"


def test_help_names_every_command_without_importing_any(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in shown] == []
    program = "import sys; from eos_vllm.cli.main import build_parser; build_parser(); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_module_whose_help_is_the_one_listed(command: str) -> None:
    module, line = COMMANDS[command]
    assert callable(importlib.import_module(f"eos_vllm.cli.{module}").add_parser)
    actions = [a for a in build_parser(command)._actions if a.dest == "command"]
    assert {choice.dest: choice.help for choice in actions[0]._choices_actions}[command] == line


@pytest.mark.parametrize("argv", [[], ["nothing"], ["plan"], ["plan", "--profile", V2, "--colour", "red"]])
def test_wrong_options_end_in_2_with_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage: eos-vllm" in capsys.readouterr().err


def test_an_interrupt_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "gaussian_tokens", interrupt)
    assert main(["verify"]) == 130


def test_a_reader_that_leaves_early_is_no_error() -> None:
    # A closed pipe: what head does to the writer.
    read, write = os.pipe()
    os.close(read)
    program = "import sys; from eos_vllm.cli.main import main; sys.exit(main(['profile', 'schema']))"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_plan_prints_each_segment_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "plan", "--profile", V2, "--retain", "64", "--exact-counts").splitlines()
    assert (
        "retain 64 (layer_average): keeps 66, 34, 20 per image; layer average 81.8, visual KV 14.2% of stock's, "
        "prefill FLOPs 25.2%, final 20"
    ) in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:1].isdigit()}
    assert rows == {
        "0-2": ["576", "664", "10.38", "100.0%", "276", "100.0%", "1", "0", "42"],
        "3-6": ["66", "154", "2.406", "23.2%", "62.72", "22.7%", "2", "2", "20"],
        "7-15": ["34", "122", "1.906", "18.4%", "49.62", "18.0%", "3", "0", "24"],
        "16-31": ["20", "108", "1.688", "16.3%", "43.9", "15.9%", "6", "2", "42"],
    }
    text = "\n".join(lines)
    assert "visual KV  40.91 MiB, stock 288 MiB" in text
    assert "stock 336 MiB: 3.50 times as many requests fit" in text
    assert "3.96 times as fast" in text


def test_plan_as_json_agrees_with_the_text_and_takes_several_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--retain",
        "192",
        "64",
        "--images",
        "2",
        "--text-tokens",
        "100",
        "--dtype",
        "float32",
        "--block-size",
        "32",
    ]
    data = json.loads(output(capsys, "plan", "--profile", V2, *argv, "--json"))
    assert (data["profile"], data["measure"]) == (V2, "layer_average")
    assert data["prompt"] == {"text_tokens": 100, "images": 2, "dtype": "float32", "block_size": 32} | {
        "visual_tokens": 576
    }
    # Removed tokens are whole blocks of 32: the schedules are 300, 200, 118 and 66, 34, 20.
    assert [plan["counts"] for plan in data["plans"]] == [[288, 192, 128], [64, 32, 32]]
    first = data["plans"][0]["reduced"]["segments"][1]
    assert (first["visual_tokens"], first["tokens"], first["kv_bytes"]) == (576, 676, 676 * 32768)
    assert first["blocks"] == 2 * 22


def test_plan_knows_models_by_name_directory_or_the_profiles_sizes(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    plans = [
        output(capsys, "plan", "--profile", "embedded-eos", *options)
        for options in ([], ["--model", str(tiny_model)], ["--model", "embedded"])
    ]
    assert plans[0] == plans[1] == plans[2]
    assert "final 64" in plans[0]


def test_plan_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refused(*argv: str) -> str:
        return refusal(capsys, "plan", *argv)

    assert "neither a file nor a shipped profile" in refused("--profile", "nothing")
    assert "profile.model.num_decoder_layers=32: the model has 40" in refused(
        "--profile", V2, "--model", "llava-1.5-13b"
    )
    assert "cannot be read" in refused("--profile", V2, "--model", str(tmp_path / "nothing"))
    assert "eos_retain=54" in refused("--profile", V2, "--retain", "54")
    assert "retain='few'" in refused("--profile", V2, "--retain", "few")
    assert "images=0" in refused("--profile", V2, "--images", "0")
    other = tmp_path / "other.json"
    data = profiles.load("embedded-eos").to_dict()
    data["model"]["num_decoder_layers"] = 9
    other.write_text(json.dumps(data))
    assert "no model of 9 layers and 576 visual tokens is known; give --model DIR" in refused("--profile", str(other))


def test_verify_prints_the_papers_figures(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "verify").splitlines()
    assert lines[0] == "Gaussian tokens, seed 42, largest difference"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ok", check] for check in ("PRUNE", "MERGE", "POOL", "REWEIGHT", "BATCH")
    ]
    data = json.loads(output(capsys, "verify", "--seed", "7", "--json"))
    assert (data["ok"], data["seed"], data["model"]) == (True, 7, None)
    assert all(check["difference"] <= check["bound"] for check in data["gaussian"])


def test_verify_ends_in_1_when_a_bound_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = equivalence.unified_operator
    monkeypatch.setattr(equivalence, "unified_operator", lambda *arguments: right(*arguments) + 1e-5)
    assert output(capsys, "verify", code=1).count("FAIL") == 4
    assert json.loads(output(capsys, "verify", "--json", code=1))["ok"] is False


def test_verify_on_the_hidden_states_of_a_model(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model)
    anchors, discards, scores = verify.hidden_states(model)
    assert (anchors.shape, discards.shape, scores.shape) == ((64, 128), (512, 128), (512,))
    assert torch.isfinite(anchors).all()
    assert len({tuple(row) for row in discards.tolist()}) == 512
    assert 0 < float(scores.sum()) < 1
    assert [c for c in corner_checks(anchors, discards, scores, 1e-9, relative=True) if not c.ok] == []
    monkeypatch.setattr(verify, "hidden_states", lambda _directory: (anchors, discards, scores))
    assert main(["verify", "--model", model, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [check["check"] for check in data["hidden_states"]] == ["PRUNE", "MERGE", "POOL", "REWEIGHT"]


def test_verify_refuses_what_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot be read" in refusal(capsys, "verify", "--model", str(tmp_path))
    shallow = write_tiny_model(tmp_path / "shallow", num_decoder_layers=2)
    assert "it has 2 decoder layers; give one of 3 or more" in refusal(capsys, "verify", "--model", str(shallow))
    empty = write_tiny_model(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert "it cannot be loaded" in refusal(capsys, "verify", "--model", str(empty))
