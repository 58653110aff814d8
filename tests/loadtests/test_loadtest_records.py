"""What is kept of requests, and what locust is told of them."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from load_builders import record, workload

from loadtests.bodies import body_of, system_message, user_message
from loadtests.client import Reply
from loadtests.events import fire
from loadtests.records import Record, record_of
from loadtests.scenarios import FAULTS, Ask


def test_round_trip_by_json() -> None:
    for made in (record(3, answer="yes", budget=64), record(cause="timeout", tokens=0, text=""), record(aborted=True)):
        assert Record.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_right_and_wrong_answers_are_marked_where_they_count() -> None:
    assert record(answer="yes").right is True
    assert record(answer="no").right is False
    assert record().right is None
    assert record(answer="yes", aborted=True).right is None
    assert record(answer="yes", cause="no usage").right is None


@pytest.mark.parametrize(
    ("status", "cause", "left"),
    [
        (400, "http 400", None),
        (404, "http 404", None),
        (200, None, "no_json not refused (200)"),
        (500, "http 500", "no_json not refused (http 500)"),
        (None, "timeout", "no_json not refused (timeout)"),
    ],
)
def test_broken_requests_must_be_refused(status: int | None, cause: str | None, left: str | None) -> None:
    kept = record_of(Ask(0, "single", "?", fault="no_json"), Reply(status=status, cause=cause), 0.0, 0.0, 0, 0)
    assert kept.cause == left
    assert not kept.good


def fired(of: Record) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    fire(SimpleNamespace(events=SimpleNamespace(request=SimpleNamespace(fire=lambda **e: events.append(e)))), of)
    return events


def test_locust_is_told_every_figure_in_milliseconds() -> None:
    events = fired(record(ttft=0.5, tpot=0.1, tokens=4, answer="yes"))
    values: dict[str, list[float]] = {}
    for event in events:
        values.setdefault(f"{event['request_type']} {event['name']}", []).append(event["response_time"])
        assert event["exception"] is None
    assert {name: pytest.approx(value) for name, value in values.items()} == {
        "CHAT single": [800],
        "METRIC end to end": [800],
        "METRIC TTFT": [500],
        "METRIC TPOT": [100],
        "METRIC inter-token latency": [100, 100, 100],
        "METRIC tokens out": [4],
        "METRIC answer right": [800],
    }


def test_locust_counts_failures_by_cause_and_leavers_apart() -> None:
    (failed,) = fired(record(cause="http 500"))
    assert (failed["request_type"], str(failed["exception"])) == ("CHAT", "http 500")
    (left,) = fired(record(aborted=True))
    assert (left["request_type"], left["exception"]) == ("ABORTED", None)


def test_body_of_a_request() -> None:
    settings = workload(output_tokens=16, budgets=(64,))
    ask = Ask(0, "single", "What?", budget=64)
    body = body_of(settings, ask, [user_message(ask)])
    assert isinstance(body, dict)
    assert body["vllm_xargs"] == {"eos_retain": 64}
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["stream"]) == (16, True, 0, True)
    assert body["stream_options"] == {"include_usage": True}
    stock = body_of(workload(fixed_output=False), Ask(0, "single", "What?"), [])
    assert "vllm_xargs" not in stock
    assert "ignore_eos" not in stock


def test_every_fault_breaks_the_request() -> None:
    ask = Ask(0, "single", "What?")
    whole = body_of(workload(), ask, [user_message(ask)])
    for fault in FAULTS:
        assert body_of(workload(), Ask(0, "single", "What?", fault=fault), [user_message(ask)]) != whole


def test_compact_records_hold_every_figure_and_little_else() -> None:
    whole = replace(record(0, ttft=0.5, tpot=0.1, tokens=16), question=2, late=0.25)
    kept = Record.from_dict(json.loads(json.dumps(whole.compact())))
    for name in ("number", "started", "ttft", "tpot", "finished", "good", "question", "from_due", "tokens_out"):
        assert getattr(kept, name) == pytest.approx(getattr(whole, name)), name
    assert len(json.dumps(whole.compact())) < 160
    failed = record(3, cause="http 500", token_times=[])
    assert Record.from_dict(failed.compact()).cause == "http 500"
    for flag in ("starter", "cut"):
        assert getattr(Record.from_dict(replace(whole, **{flag: True}).compact()), flag)


def test_what_the_window_cut_off_is_neither_good_nor_failed() -> None:
    reply = Reply(status=200, token_times=[0.5], cause="stream broken")
    cut = record_of(Ask(0, "single", "?", answer="yes"), reply, 0.0, 0.0, 0, 0, cut=True)
    assert (cut.good, cut.cause, cut.right, cut.ttft) == (False, None, None, 0.5)
    (event,) = fired(cut)
    assert (event["request_type"], event["exception"]) == ("CUT", None)


def test_system_prompts_stand_in_front_and_starters_are_shorter() -> None:
    ask = Ask(0, "shared_system", "What?", system="Be brief.", output_tokens=3, starter=True)
    body = body_of(workload(), ask, [*system_message(ask), user_message(ask)])
    assert isinstance(body, dict)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["max_tokens"] == 3
    assert system_message(Ask(0, "single", "What?")) == []
