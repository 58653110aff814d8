"""When a run's steady part begins and ends, and which requests count in it."""

from dataclasses import replace
from typing import Any

import pytest
from load_builders import record, workload

from eos_vllm.core.errors import SettingError
from loadtests.figures import Steady
from loadtests.window import Window


def window(**settings: Any) -> Window:
    return Window(workload(**({"window": 10.0, "window_requests": 2, "concurrency": 2} | settings)))


def test_opens_when_every_user_has_had_a_first_answer() -> None:
    made = window()
    made.first_over(3.0)
    assert made.opened is None
    made.first_over(5.0)
    assert made.opened == 5.0


def test_closes_with_a_visit_once_it_has_seconds_and_answers() -> None:
    made = window(concurrency=1)
    made.answered()
    made.first_over(1.0)
    made.visit_over(11.5)
    assert made.closed is None, "seconds, but no answers"
    made.answered()
    made.answered()
    assert made.closed is None, "in the middle of a visit"
    made.visit_over(12.0)
    assert (made.closed, made.full) == (12.0, True)
    early = window(concurrency=1)
    early.first_over(1.0)
    early.answered()
    early.answered()
    early.visit_over(10.9)
    assert early.closed is None, "answers, but not long enough"


def test_limits_open_and_close_it_all_the_same_and_say_so() -> None:
    made = window(ramp_most=20.0, window_most=30.0)
    made.tick(19.9)
    assert made.opened is None
    made.tick(20.0)
    made.tick(49.9)
    assert (made.opened, made.closed, made.full) == (20.0, None, False)
    made.tick(50.0)
    assert made.closed == 50.0
    assert made.to_dict() == {"opened": 20.0, "closed": 50.0, "full": False}


def test_open_loop_goes_by_the_clock() -> None:
    made = window(rate=2.0)
    made.first_over(0.5)
    made.first_over(0.6)
    made.tick(4.9)
    assert made.opened is None
    made.tick(5.0)
    made.visit_over(16.0)
    made.tick(14.9)
    assert (made.opened, made.closed) == (5.0, None)
    made.tick(15.0)
    assert (made.closed, made.full) == (15.0, True)


def test_windows_go_with_no_other_end() -> None:
    for end in ({"requests": 3}, {"seconds": 3.0}, {"window_most": 5.0}, {"window": 0.0}):
        with pytest.raises(SettingError, match="window"):
            workload(**({"window": 10.0} | end))


def test_requests_count_where_their_last_token_comes() -> None:
    # Each is answered 0.9 s after it was sent, and begins to be 0.5 s after.
    records = [
        record(0, started=0.0),
        replace(record(1, started=1.5), starter=True),
        record(2, started=2.0),
        record(3, started=2.5, cause="http 500", token_times=[]),
        replace(record(4, started=3.4), cut=True),
        record(5, started=3.5),
    ]
    steady = Steady.of(records, {"window": {"opened": 1.0, "closed": 4.0, "full": True}})
    assert [r.number for r in steady.answered] == [1, 2]
    assert [r.number for r in steady.full] == [2]
    # The last but one was cut off, but its first token had come; the last one's comes at the very end.
    assert [r.number for r in steady.begun] == [2, 4, 5]
    assert steady.requests_per_second == pytest.approx(2 / 3)


def test_runs_without_a_window_count_whole() -> None:
    steady = Steady.of([record(0, started=1.0), record(1, started=2.0)], {})
    assert steady.requests_per_second == pytest.approx(2 / 1.9)
    assert Steady.of([record(cause="timeout", token_times=[])], {}).requests_per_second == 0


def test_a_window_that_never_closed_counts_nothing() -> None:
    steady = Steady.of([record(0)], {"window": {"opened": None, "closed": None, "full": True}})
    assert steady.requests_per_second == 0
    assert steady.answered == []
