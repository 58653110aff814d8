"""The command `eos-search run`: flags over config, output, and mistakes in one line."""

import json
from pathlib import Path

import pytest

from eos_search.main import COMMANDS, main
from eos_search.settings import SearchSettings, read_config, read_settings
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import read_profile


def test_run_writes_a_profile(small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    settings = {"model": str(small_path), "data_format": "cluttervqa", "samples": 8, "budget": 9, "steps": 100}
    config.write_text(json.dumps(settings))
    flags = ["--config", str(config), "--output", str(tmp_path / "run"), "--budget", "6", "--steps", "2"]
    assert main(["run", *flags, "--align-layers", "2,3", "--placement", "1,3", "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    profile = read_profile(tmp_path / "run/theta.json")
    assert profile.layers == (1, 3)
    assert profile.provenance["settings"]["budget"] == 6
    assert profile.provenance["settings"]["align_layers"] == [2, 3]
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'run/theta.json'}"
    assert out.splitlines()[0].startswith("layer 1")
    assert "8 rows:" in err
    assert "step 2/2" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model='nothing': Field required"),
        (["--model", "x"], "output='nothing': Field required"),
        (["--model", "x", "--output", "y", "--budget", "none"], "budget='none'"),
        (["--config", "no-such"], "config='no-such': it cannot be read.*embedded, embedded-cost, llava-1.5-7b"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert main(["run", *flags]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.startswith("eos-search: error: ")
    assert len(err.splitlines()) == 1


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for field in SearchSettings.model_fields:
        assert f"--{field.replace('_', '-')} " in out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_flags_configs_and_plain_data_agree() -> None:
    base = {"model": "m", "output": "o", "frozen": ["gate"], "align_layers": [4], "cross_entropy": False}
    flags = {"model": "m", "output": "o", "frozen": "gate", "align_layers": "4", "cross_entropy": "false"}
    settings = read_settings(base)
    assert settings == read_settings({}, flags)
    assert read_settings(json.loads(json.dumps(settings.to_dict()))) == settings
    assert read_settings(base, {"align_layers": "default"}).align_layers is None


def test_configs_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("{")
    for name in ("list.json", "text.json"):
        with pytest.raises(SettingError, match="no JSON"):
            read_config(str(tmp_path / name))
