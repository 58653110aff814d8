"""Records as locust's events, so that TTFT and its kin stand in locust's CSV, HTML and web page."""

import itertools
from typing import Any

from loadtests.records import Record

METRIC = "METRIC"


class RequestFailed(Exception):
    """A failure as locust counts it: equal causes are one row of its table."""


def fire(environment: Any, record: Record) -> None:
    """Tells locust of one request: a row for the request itself, and one for each figure of it.

    Rows of type ``CHAT`` are requests; their time is the whole answer's. ``METRIC`` rows hold milliseconds (``tokens
    out``: tokens), so locust's own "Aggregated" row mixes both and means nothing here. Requests that the client left
    or broke on purpose, or that the end of the run cut off, have types of their own.
    """
    kind = "CHAT"
    if record.fault is not None:
        kind = "BROKEN"
    elif record.aborted or record.cut:
        kind = "ABORTED" if record.aborted else "CUT"
    error = None if record.cause is None else RequestFailed(record.cause)
    seconds = record.end if kind != "CHAT" or not record.times else record.times[-1]
    _event(environment, kind, record.fault or record.scenario, seconds * 1000, record.tokens_out or 0, error)
    if not record.good or record.starter:
        return
    _event(environment, METRIC, "end to end", record.times[-1] * 1000)
    if record.ttft is not None:
        _event(environment, METRIC, "TTFT", record.ttft * 1000)
    if record.tpot is not None:
        _event(environment, METRIC, "TPOT", record.tpot * 1000)
    for earlier, later in itertools.pairwise(record.times):
        _event(environment, METRIC, "inter-token latency", (later - earlier) * 1000)
    _event(environment, METRIC, "tokens out", record.tokens_out or 0)
    if record.right is not None:
        _event(environment, METRIC, "answer right" if record.right else "answer wrong", record.times[-1] * 1000)


def _event(
    environment: Any, kind: str, name: str, value: float, length: int = 0, error: Exception | None = None
) -> None:
    environment.events.request.fire(
        request_type=kind, name=name, response_time=value, response_length=length, exception=error, context={}
    )
