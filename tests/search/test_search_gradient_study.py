"""The study of estimators: verdicts from made-up gradients, the reference, and the command end to end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_cases import make_settings

from eos_search.ablations.verdicts import BRUTE, gradients_table, summarise
from eos_search.estimators.base import KEEP_NAMES
from eos_search.main import main

TRUE = (1.0, 3.0, 0.0)


def made_up(questions: int = 40, **estimators: tuple[float, ...]) -> dict[str, Any]:
    """A raw result in which each estimator says a multiple of the reference, layer by layer; others say the same."""
    noise = np.random.default_rng(0)
    rows = []
    for number in range(questions):
        brute = np.array(TRUE) + np.array([*noise.normal(0, 0.5, 2), 0.1 * (-1) ** number])
        said = {name: (brute * estimators.get(name, (1.0, 1.0, 1.0))).tolist() for name in KEEP_NAMES}
        rows.append({"gradients": {"start, own counts": {BRUTE: brute.tolist(), **said}}})
    return {"rows": rows, "points": {"start": {"layers": [2, 3, 5]}}}


def test_verdicts_tell_sign_order_and_size_apart() -> None:
    result = made_up(
        eq12=(-1.0, 0.8, 1.0), ghosts=(1.8, 0.55, 1.0), differences=(1.0, 1.0, -9.0), eq12_served=(0.3, 1.0, 1.0)
    )
    found = summarise(result)
    entry = found["summary"]["start, own counts"]
    # The last layer's reference is not clearly other than 0: it has no sign and no ratio, but a place in the order.
    assert entry["clear"] == [True, True, False]
    assert entry["verdicts"]["eq12"] == {"sign": False, "order": False, "size": False}
    assert entry["verdicts"]["ghosts"] == {"sign": True, "order": False, "size": True}
    assert entry["verdicts"]["differences"] == {"sign": True, "order": True, "size": True}
    assert entry["verdicts"]["eq12_served"] == {"sign": True, "order": True, "size": False}
    assert found["default"] == ["differences"]
    assert entry["estimates"]["ghosts"]["ratio"][:2] == pytest.approx([1.8, 0.55])
    assert entry["estimates"]["ghosts"]["ratio"][2] is None
    values = np.array([row["gradients"]["start, own counts"][BRUTE] for row in result["rows"]])
    assert entry["estimates"][BRUTE]["se"] == pytest.approx((values.std(axis=0, ddof=1) / math.sqrt(40)).tolist())
    table = gradients_table(result | found)
    assert "| ghosts |" in table
    assert table.endswith("right in all of these: differences.")


def test_one_question_gives_no_verdict() -> None:
    assert summarise(made_up(1)) == {"summary": {}, "default": []}


@pytest.fixture
def argv(small_path: Path, tmp_path: Path) -> list[str]:
    """The study on the small model: a run of two steps, two questions, both rules of counts."""
    config = tmp_path / "config.json"
    settings = make_settings(small_path, tmp_path / "run", steps=2, log_every=1, samples=4, keep_width=0.2)
    config.write_text(json.dumps(settings.to_dict()))
    assert main(["run", "--config", str(config), "--quiet"]) == 0
    command = ["ablate", "gradients", "--config", str(config), "--run", str(tmp_path / "run"), "--budgets", "own,6"]
    return [*command, "--questions", "2", "--width", "0.3", "--out", str(tmp_path / "gradients.json")]


def test_the_command_measures_goes_on_and_is_drawn(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    out = tmp_path / "gradients.json"
    result = json.loads(out.read_text())
    assert list(result["summary"]) == [
        f"{point}, {rule}" for point in ("start", "searched") for rule in ("own counts", "budget 6")
    ]
    assert result["points"]["start"]["layers"] == [1, 2, 4]
    for row in result["rows"]:
        for found in row["gradients"].values():
            assert set(found) == {BRUTE, *KEEP_NAMES}
            assert all(len(values) == 3 and np.isfinite(values).all() for values in found.values())
    # Counts that are scaled to a budget pull the last discard through earlier counts alone, Eq. 11 directly.
    first = result["rows"][0]["gradients"]
    assert first["start, own counts"]["differences"] != first["start, budget 6"]["differences"]
    assert first["start, own counts"]["eq12"] == first["start, own counts"]["eq12_served"]
    assert "| brute |" in capsys.readouterr().out
    before = out.read_text()
    assert main(argv) == 0
    assert out.read_text() == before
    picture = tmp_path / "figure.png"
    assert main(["plot", "gradients", "--raw", str(out), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert json.loads(picture.with_suffix(".json").read_text())["questions"] == 2
    assert main([*argv, "--width", "0.2"]) == 2
    assert "width" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lambda_align": 0.0}))
    assert main(argv) == 2
    assert "--out='settings'" in capsys.readouterr().err
    out.write_text(json.dumps({name: value for name, value in result.items() if name not in ("settings", "tables")}))
    assert main(argv) == 0, "studies of before they were kept go on"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--questions", "1"], "questions=1"),
        (["--width", "0"], "width=0"),
        (["--run", "nowhere"], "--run='nowhere'"),
        (["--budgets", "many"], "--budgets='many'"),
    ],
)
def test_mistakes_are_one_line(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "gradients", "--config", "embedded", *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
