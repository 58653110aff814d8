"""`eos-vllm profile` through ``main``, and the exported JSON schema."""

import json
from pathlib import Path

import pytest
from cli_runs import V2, output, refusal

from eos_vllm import profiles
from eos_vllm.cli import profile as profile_cli
from eos_vllm.cli.main import main
from eos_vllm.core.profile import read_profile

SCHEMA = Path(__file__).parents[2] / "docs" / "eos-profile.schema.json"


def test_profile_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [line.split()[0] for line in output(capsys, "profile", "list").splitlines()]
    assert listed == list(profiles.names())
    shown = output(capsys, "profile", "show", "eos-llava-1.5-7b", "--retain", "32")
    assert "after layer 6: keeps 73 (gamma 0.083, tau 0.22, theta 0.1, rho 0, nu 0)" in shown
    assert "after layer 16: keeps 32 (prune)" in shown
    assert "retain 32 by final (the rescaling rule): layer average 127.7, visual KV 22.2% of stock's, final 32\n" in (
        shown
    )
    shown = output(capsys, "profile", "show", V2, "--retain", "64")
    assert "retain 64 by layer_average (a published schedule): layer average 81.8, visual KV 14.2%" in shown


def test_profile_validate_tells_of_every_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, broken = profiles.path(V2), tmp_path / "broken.json"
    broken.write_text("{")
    assert output(capsys, "profile", "validate", str(good)).startswith(f"{good}: valid, {V2} keeps 66, 34, 20")
    assert main(["profile", "validate", str(broken), str(good), str(tmp_path / "none.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{good}: valid")
    first, second = captured.err.splitlines()
    assert (str(broken) in first, "it is no JSON" in first, "none.json" in second) == (True, True, True)


def test_profile_validate_refuses_a_budget_that_cannot_be_met(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = profiles.load(V2).to_dict()
    data["budget"]["tokens"] = 20
    file = tmp_path / "theta.json"
    file.write_text(json.dumps(data))
    assert "cannot go below 54.0" in refusal(capsys, "profile", "validate", str(file))


def test_profile_rescale_writes_a_valid_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "theta.json"
    shown = output(capsys, "profile", "rescale", "eos-llava-1.5-7b", "--retain", "32", "--out", str(out))
    costs = "layer average 127.7, visual KV 22.2% of stock's, final 32"
    assert shown == f"wrote {out}: eos-llava-1.5-7b keeps 191, 73, 32 of 576, {costs}\n"
    assert read_profile(out).schedules == {"32": (191, 73, 32)}
    again = output(capsys, "profile", "rescale", str(out), "--retain", "16", "--out", str(out))
    assert "final 16" in again
    for target in (tmp_path / "no" / "such.json", tmp_path):
        argv = ["profile", "rescale", V2, "--retain", "64", "--out", str(target)]
        assert "it cannot be written" in refusal(capsys, *argv)


def test_profile_scale_prints_or_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = json.loads(output(capsys, "profile", "scale", V2, "--layers", "8"))
    assert [reducer["layer"] for reducer in data["reducers"]] == [0, 1, 3]
    assert data["model"]["visual_tokens"] == 576
    out = tmp_path / "small.json"
    options = ["--layers", "16", "--visual-tokens", "144", "--name", "mine", "--out", str(out)]
    assert "mine keeps 17, 9, 5" in output(capsys, "profile", "scale", V2, *options)
    scaled = read_profile(out)
    assert (scaled.name, scaled.layers, scaled.model.visual_tokens) == ("mine", (1, 3, 7), 144)
    assert "3 reducers do not fit; give 4 layers or more" in refusal(capsys, "profile", "scale", V2, "--layers", "3")


def test_the_schema_in_the_documentation_is_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "profile", "schema")
    assert printed == SCHEMA.read_text(encoding="utf-8"), "run `make docs`"


def test_the_schema_names_every_field_and_range() -> None:
    schema = profile_cli.json_schema()
    assert schema["required"] == ["schema", "name", "model", "reducers", "budget"]
    assert schema["additionalProperties"] is False
    reducer = schema["$defs"]["Reducer"]
    assert (reducer["properties"]["theta"]["minimum"], reducer["properties"]["theta"]["maximum"]) == (-1, 1)
    assert reducer["properties"]["tau"]["exclusiveMinimum"] == 0
    example = profiles.load(V2).to_dict()
    assert set(example) <= set(schema["properties"])
    assert set(example["reducers"][0]) == set(reducer["properties"]) - {"select"} == set(reducer["required"])
