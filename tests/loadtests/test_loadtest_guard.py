"""The regression guard's decision, and its committed floor."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.core.errors import SettingError
from loadtests import guard
from loadtests.guard import FLOOR, Floor, decide, read_floor
from loadtests.peers import PeerFigures
from loadtests.servers import GivenServers
from loadtests.settings import Workload

FLOOR_OF_3 = Floor("bench-88m", 64, 3.0)


def rounds(*ratios: float) -> list[dict[Any, float]]:
    return [{"stock": ratio * 0.5, "eos": 0.5} for ratio in ratios]


@pytest.mark.parametrize(
    ("ratios", "passes"),
    [((3.5,), True), ((3.0, 3.0), True), ((2.9,), False), ((2.0, 3.1, 3.2), True), ((2.0, 2.1, 9.0), False)],
)
def test_the_median_of_rounds_is_held_against_the_floor(ratios: tuple[float, ...], passes: bool) -> None:
    decision = decide(rounds(*ratios), FLOOR_OF_3)
    assert decision.passes is passes
    assert ("below the floor of 3.00" in decision.text) is not passes


def test_unanswered_requests_fail_whatever_the_ratio() -> None:
    decision = decide(rounds(9.0), FLOOR_OF_3, failed=1)
    assert not decision.passes
    assert "1 requests were not answered" in decision.text


def test_committed_floor_rests_on_the_committed_result() -> None:
    floor = read_floor(FLOOR)
    result = json.loads((Path(__file__).parents[2] / "results" / "throughput-cpu.json").read_text())
    large = next(case for case in result["cases"] if case["kv"] == "large")
    measured = [one[str(floor.budget)] / one["stock"] for one in large["requests_per_second"]]
    assert floor.preset == result["model"]["name"]
    assert 0.6 * min(measured) < floor.ratio < 0.9 * min(measured)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"preset": "a", "budget": 0, "ratio": 1}', '{"preset": "a", "budget": 1, "ratio": 0}']
)
def test_refused_floors(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "floor.json"
    file.write_text(text)
    with pytest.raises(SettingError, match="floor"):
        read_floor(file)
    assert guard.main(["--floor", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("speed_up", "code"), [(4.0, 0), (1.5, 1)])
def test_whole_guard(
    speed_up: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []

    @contextmanager
    def serving(*_: Any) -> Iterator[tuple[GivenServers, str]]:
        yield GivenServers("http://127.0.0.1:1", "http://127.0.0.1:2"), "m"

    def by_locust(workload: Workload, _: Path) -> PeerFigures:
        turns.append("eos" if workload.budgets else "stock")
        # A machine that grows slower with every turn, which there and back evens out.
        rate = (speed_up if workload.budgets else 1.0) / (1 + 0.05 * len(turns))
        return PeerFigures(workload.requests or 0, rate, 1.0, 0.1)

    monkeypatch.setattr(guard, "serving", serving)
    monkeypatch.setattr(guard, "by_locust", by_locust)
    monkeypatch.setattr(guard, "speed_subject", lambda *_: None)
    assert guard.main(["--rounds", "2", "--requests", "2"]) == code
    assert turns == ["stock", "eos", *("stock", "eos", "eos", "stock") * 2]
    assert f"answers {speed_up:.2f} times" in capsys.readouterr().out
