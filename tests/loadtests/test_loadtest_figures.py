"""Figures from records: percentiles, goodput, lateness, ratios and their intervals."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from load_builders import metrics, record

from eos_vllm.core.errors import SettingError
from loadtests.figures import Cell, Group, groups_of
from loadtests.grid import Load
from loadtests.measures import SLO, Ratio, Slo, parse_slo, percentile, t_quantile
from loadtests.records import Record

WINDOW = {"window": {"opened": 0.0, "closed": 10.0, "full": True}}


def cell(records: list[Record], setting: str = "64", repeat: int = 1, client: Any = WINDOW) -> Cell:
    seen = metrics([2.0], [0.5])
    return Cell("single", Load(8), setting, repeat, 1, f"t{repeat}", 9.0, tuple(records), seen, client)


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == pytest.approx(2.5)
    assert percentile(range(101), 99) == pytest.approx(99)


@pytest.mark.parametrize(("degrees", "want"), [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (20, 2.086)])
def test_quantiles_of_student(degrees: int, want: float) -> None:
    assert t_quantile(degrees) == pytest.approx(want, abs=0.003)


def test_interval_of_a_ratio() -> None:
    # Logarithms 0 and ln 4 on average ln 2; their standard error is ln 2.
    ratio = Ratio.of([1.0, 4.0])
    assert ratio.mean == pytest.approx(2.0)
    assert ratio.low == pytest.approx(2.0 * math.exp(-12.706 * math.log(2)), rel=1e-3)
    assert ratio.high == pytest.approx(2.0 * math.exp(12.706 * math.log(2)), rel=1e-3)
    assert (Ratio.of([0.5]).low, str(Ratio.of([0.5]))) == (None, "0.50")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.90, 0.91, 0.90, 0.91, 0.90], "slower"),
        ([0.90, 0.91], "slower"),
        ([0.97, 1.02, 0.99, 1.03, 0.98], "no difference"),
        ([0.97, 1.02, 0.99, 1.03], "not decided"),
        ([1.02, 1.03, 1.02, 1.03, 1.02], "faster"),
        ([0.7], "not decided"),
        ([1.05], "not decided"),
        ([2.0], "faster"),
        ([0.7, 3.0, 2.0, 0.9, 1.5], "no difference"),
    ],
)
def test_verdicts(values: list[float], verdict: str) -> None:
    assert Ratio.of(values).verdict == verdict


def test_failures_by_cause() -> None:
    made = cell([record(cause="http 500"), record(1), replace(record(2), cut=True)])
    assert made.failures == {"http 500": 1}


def test_goodput_counts_from_when_a_request_was_due() -> None:
    slow, fast = record(0, ttft=2.0, tpot=0.1), record(1, ttft=0.5, tpot=0.3)
    late = replace(record(2, ttft=0.5), late=1.0)
    made = cell([slow, fast, late, record(3, ttft=0.1, cause="no usage"), record(4, ttft=0.1, aborted=True)])
    assert made.requests_per_second == pytest.approx(0.3)
    assert made.goodput(Slo(1.0, None)) == pytest.approx(0.1)
    assert made.goodput(Slo()) == pytest.approx(0.3)
    assert Slo(None, 0.2).met(slow)
    assert not Slo(None, 0.2).met(fast)
    assert Slo(1.0, 0.2).met(record(ttft=0.5, tokens=1)), "one token has no time per output token to break"
    assert cell([]).goodput(Slo()) == 0


def test_slo_from_text() -> None:
    assert parse_slo("ttft:2000,tpot:100") == Slo(2.0, 0.1)
    assert parse_slo("tpot:50") == Slo(None, 0.05)
    assert str(SLO) == "TTFT ≤ 5 s, TPOT ≤ 0.5 s"
    for text in ("ttft", "e2e:3", "ttft:fast", "ttft:0", "tpot:-1"):
        with pytest.raises(SettingError, match="slo"):
            parse_slo(text)


def test_latencies_pool_the_repeats_and_tell_turns_apart() -> None:
    second = replace(record(1, ttft=0.2), question=2)
    group = Group(
        "single", Load(8), "64", (cell([record(ttft=1.0), second]), cell([record(ttft=3.0, tpot=0.2)], "64", 2))
    )
    assert group.ttft(50) == pytest.approx(1.0)
    assert group.ttft(50, 1) == pytest.approx(2.0)
    assert group.ttft(50, 2) == pytest.approx(0.2)
    assert group.ttft(50, 3) is None
    assert group.tpot(100) == pytest.approx(0.2)
    assert group.e2e(50) == pytest.approx(1.4)
    assert group.by_repeat(lambda g: g.ttft(50, 2)) == {1: pytest.approx(0.2)}


def test_lateness_is_of_the_visit_and_adds_to_the_first_token() -> None:
    first, second = replace(record(0), late=2.0), replace(record(1), question=2)
    group = Group("single", Load(rate=1.0), "64", (cell([first, second]),))
    assert group.late(100) == group.late(50) == 2.0
    assert group.ttft(100) == pytest.approx(0.5)
    assert group.ttft(100, from_due=True) == pytest.approx(2.5)


def test_groups_hold_the_repeats_of_one_setting_in_order() -> None:
    cells = [cell([record()], s, r) for r, s in itertools.product((2, 1), ("stock", "64"))]
    groups = groups_of(cells)
    assert [(g.setting, [c.repeat for c in g.cells]) for g in groups] == [("stock", [1, 2]), ("64", [1, 2])]
