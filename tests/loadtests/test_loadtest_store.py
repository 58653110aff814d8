"""Raw results: whole or not at all, and never of two kinds in one folder."""

import json
from pathlib import Path

import pytest

from eos_vllm.core.errors import SettingError
from loadtests.store import Store, dumps


def test_cells_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.begin({"budgets": [64]}, {"left_out": {}})
    assert not store.has("large/r1/c1/64")
    store.save("large/r1/c1/64", {"key": "large/r1/c1/64", "requests": [{"number": 0}, {"number": 1}]})
    assert store.has("large/r1/c1/64")
    assert store.cells() == [{"key": "large/r1/c1/64", "requests": [{"number": 0}, {"number": 1}]}]
    assert not list(tmp_path.rglob("*.part"))


def test_a_session_more_for_every_start(tmp_path: Path) -> None:
    for number in range(2):
        store = Store(tmp_path)
        store.begin({"loads": (1, 8)}, {"number": number})
        store.note(seconds=10 + number)
    assert store.sweep()["sessions"] == [{"number": 0, "seconds": 10}, {"number": 1, "seconds": 11}]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    Store(tmp_path).begin({"budgets": [64], "seed": 0}, {})
    with pytest.raises(SettingError, match="other settings \\(budgets, dtype\\)"):
        Store(tmp_path).begin({"budgets": [32], "seed": 0, "dtype": "float16"}, {})


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        Store(tmp_path).sweep()
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SettingError, match="no JSON"):
        Store(tmp_path).sweep()


def test_json_has_a_line_for_each_request() -> None:
    data = {"a": 1, "requests": [{"n": 0, "t": [1, 2]}, {"n": 1, "t": []}], "none": []}
    text = dumps(data)
    assert json.loads(text) == data
    assert sum('"n":' in line for line in text.splitlines()) == 2
