"""The rehearsal of ``make reproduce`` with two steps, one budget and real servers: search, servers, tables."""

import json
from pathlib import Path

import pytest

from eos_search.main import main
from eos_vllm.core.profile import read_profile

pytestmark = pytest.mark.serving
TASKS = ("cluttervqa_presence", "cluttervqa_counting")


def test_the_rehearsal_ends_in_the_papers_tables(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["reproduce", "--model", "embedded", "--steps", "2", "--budgets", "16", "--limit", "8"]
    argv += ["--tasks", ",".join(TASKS), "--profiles", "embedded-sparsevlm-v2", "--out", str(tmp_path)]
    assert main(argv) == 0
    searched = read_profile(tmp_path / "search/theta.json")
    cases = {case["profile"]: case for case in json.loads((tmp_path / "lmms.json").read_text())["cases"]}
    assert list(cases) == ["embedded-sparsevlm-v2", searched.name]
    for name in cases:
        # What the server counted is what the table says that it keeps.
        assert list(cases[name]["kept_per_image"].values()) == cases[name]["expected"]
        assert cases[name]["expected"][-1] == 16
        assert set(cases[name]["scores"]) == set(TASKS)
    page = (tmp_path / "tables.md").read_text()
    assert all(f"## Table {number}" in page for number in (4, 7, 8))
    assert "minus embedded-sparsevlm-v2" in page
    assert (tmp_path / "search.png").exists()
    capfd.readouterr()
    assert main([*argv, "--dry-run"]) == 0
    assert "eos-search run" not in capfd.readouterr().out
