"""Settings of a run: round trip, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from load_builders import workload

from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.errors import SettingError
from loadtests.settings import BUDGET_FIELD, Workload, parse_weights


def test_the_field_of_a_budget_is_that_of_the_server() -> None:
    assert BUDGET_FIELD == REQUEST_FIELD


def test_round_trip_by_json(tmp_path: Path) -> None:
    made = workload(budgets=(64, 16), scenarios={"single": 2.0, "text_only": 1.0}, rate=0.5, requests=7, label="a/b")
    file = tmp_path / "workload.json"
    file.write_text(json.dumps(made.to_dict()))
    assert Workload.read(file) == made


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"requests": 0}, "requests"),
        ({"rate": 0.0}, "rate"),
        ({"rate": -1.0}, "rate"),
        ({"seconds": 0}, "seconds"),
        ({"timeout": 0}, "timeout"),
        ({"budgets": (0,)}, "budgets"),
        ({"repeat_share": 1.5}, "repeat_share"),
        ({"abort_share": -0.1}, "abort_share"),
        ({"malformed_share": True}, "malformed_share"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"prompt_characters": 0}, "prompt_characters"),
        ({"scenarios": {"duet": 1.0}}, "scenarios"),
        ({"scenarios": {"single": 0.0}}, "scenarios"),
        ({"scenarios": {"single": -1.0, "text_only": 2.0}}, "scenarios"),
        ({"scenarios": {}}, "scenarios"),
    ],
)
def test_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError) as error:
        workload(**settings)
    assert error.value.field == named


def test_refused_files(tmp_path: Path) -> None:
    file = tmp_path / "workload.json"
    with pytest.raises(SettingError, match="cannot be read"):
        Workload.read(file)
    file.write_text("{")
    with pytest.raises(SettingError, match="no JSON"):
        Workload.read(file)
    file.write_text(json.dumps(workload().to_dict() | {"users": 3}))
    with pytest.raises(SettingError, match="users=3"):
        Workload.read(file)
    file.write_text('{"base_url": "http://x", "model": "m"}')
    with pytest.raises(SettingError, match="rows"):
        Workload.read(file)


def test_weights() -> None:
    assert parse_weights("single=3, text_only") == {"single": 3.0, "text_only": 1.0}
    with pytest.raises(SettingError, match="scenarios"):
        parse_weights("single=many")
