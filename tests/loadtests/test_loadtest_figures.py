"""Figures from records: rates, percentiles, goodput, KV memory, ratios."""

import itertools
from typing import Any

import pytest
from load_builders import metrics, record

from eos_vllm.core.errors import SettingError
from loadtests.figures import Cell, Group, groups_of, ratios
from loadtests.measures import Slo, parse_slo, percentile, relative_range, wilson
from loadtests.records import Record


def cell(records: list[Record], setting: str = "64", repeat: int = 1, **more: Any) -> Cell:
    found = more.pop("metrics", metrics([2.0], [0.5]))
    return Cell("large", repeat, setting, more.pop("users", 8), None, 1, f"t{repeat}", 9.0, tuple(records), found, {})


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == pytest.approx(2.5)
    assert percentile(range(101), 99) == pytest.approx(99)


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0


def test_relative_range() -> None:
    assert relative_range([2.0, 1.0, 4.0]) == pytest.approx(1.5)
    assert relative_range([2.0]) == 0.0


def test_rate_counts_answered_requests_from_the_first_sent_to_the_last_token() -> None:
    # The last token comes at 3 + 0.5 + 4 * 0.1; the failed request began first.
    made = cell([record(started=1.0, cause="http 500", token_times=[]), record(1, started=2.0), record(2, started=3.0)])
    assert made.duration == pytest.approx(2.9)
    assert made.requests_per_second == pytest.approx(2 / 2.9)
    assert made.failures == {"http 500": 1}


def test_nothing_answered() -> None:
    made = cell([record(cause="timeout", token_times=[])])
    assert (made.duration, made.requests_per_second, made.goodput(Slo())) == (0.0, 0.0, 0.0)


def test_goodput() -> None:
    slow, fast = record(0, ttft=2.0, tpot=0.1), record(1, ttft=0.5, tpot=0.3)
    made = cell([slow, fast, record(2, ttft=0.1, cause="no usage"), record(3, ttft=0.1, aborted=True)])
    share = made.goodput(Slo(1.0, None)) / made.requests_per_second
    assert share == pytest.approx(0.5)
    assert Slo(None, 0.2).met(slow)
    assert not Slo(None, 0.2).met(fast)
    assert Slo(1.0, 0.2).met(record(ttft=0.5, tokens=1)), "one token has no time per output token to break"
    assert made.goodput(Slo()) == pytest.approx(made.requests_per_second)


def test_slo_from_text() -> None:
    assert parse_slo("ttft:2000,tpot:100") == Slo(2.0, 0.1)
    assert parse_slo("tpot:50") == Slo(None, 0.05)
    assert str(Slo(2.0, 0.1)) == "TTFT ≤ 2 s, TPOT ≤ 0.1 s"
    for text in ("ttft", "e2e:3", "ttft:fast", "ttft:0", "tpot:-1"):
        with pytest.raises(SettingError, match="slo"):
            parse_slo(text)


def test_latencies_pool_the_repeats() -> None:
    group = Group("large", "64", 8, (cell([record(ttft=1.0)]), cell([record(ttft=3.0, tpot=0.2)], repeat=2)))
    assert group.ttft(50) == pytest.approx(2.0)
    assert group.tpot(99) == pytest.approx(0.199)
    assert group.itl(50) == pytest.approx(0.15)
    assert group.e2e(50) == pytest.approx((1.4 + 3.8) / 2)
    assert group.prompt_tokens == 664


def test_kv_memory_weighs_each_look_by_its_requests() -> None:
    # 100 blocks of 10 bytes: 1 request held 20 of them, then 4 held 80; an idle look says nothing.
    made = cell([record()], metrics=metrics([1.0, 4.0, 0.0], [0.2, 0.8, 0.0]))
    assert made.kv_per_request(10) == pytest.approx(200)
    assert made.most_running == 4
    assert cell([record()], metrics=metrics([0.0], [0.0])).kv_per_request(10) is None
    assert cell([record()], metrics=metrics([], [])).most_running is None


def test_client_and_server_are_compared_only_where_both_counted_the_same_requests() -> None:
    rise = {"answered": 2.0, "generation_tokens": 10.0, "prompt_tokens": 1300.0}
    made = cell([record(0), record(1)], metrics=metrics([1.0], [0.1], **rise))
    assert made.agreement() == {"requests": (2, 2), "tokens out": (10, 10), "prompt tokens": (1328, 1300)}
    assert cell([record(0), record(1, aborted=True)], metrics=metrics([1.0], [0.1], **rise)).agreement() == {}
    assert cell([record()]).agreement() == {}


def test_groups_hold_the_repeats_of_one_setting_in_order() -> None:
    cells = [cell([record()], s, r) for r, s in itertools.product((2, 1), ("stock", "64"))]
    groups = groups_of(cells)
    assert [(g.setting, [c.repeat for c in g.cells]) for g in groups] == [("stock", [1, 2]), ("64", [1, 2])]


def test_ratios_pair_repeats() -> None:
    def of(setting: str, seconds: dict[int, float]) -> Group:
        cells = tuple(cell([record(ttft=s, tokens=1)], setting, r) for r, s in seconds.items())
        return Group("large", setting, 8, cells)

    assert ratios(of("64", {1: 1.0, 2: 2.0, 3: 1.0}), of("stock", {1: 2.0, 2: 3.0})) == pytest.approx([2.0, 1.5])


def test_answers_right() -> None:
    records = [record(0, answer="yes"), record(1, answer="no"), record(2), record(3, answer="yes", cause="timeout")]
    assert Group("accuracy", "64", 8, (cell(records),)).marks == (1, 2)
