"""One streaming request: times of tokens, and what can go wrong."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from stub_server import PROMPT_TOKENS, StubServer, stub_server

from loadtests.client import Reply, ask


class Clock:
    """Seconds that pass only when the stream says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeResponse:
    """A stream whose pieces come at given moments."""

    status_code = 200

    def __init__(self, clock: Clock, pieces: list[tuple[float, bytes]]) -> None:
        self.clock, self.pieces = clock, pieces
        self.headers = {"Transfer-Encoding": "chunked"}

    def __enter__(self) -> "FakeResponse":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iter_content(self, chunk_size: int | None) -> Iterator[bytes]:
        assert chunk_size is None, "a chunk must be handed over when it comes"
        for at, piece in self.pieces:
            self.clock.now = 100.0 + at
            yield piece


class FakeSession:
    def __init__(self, response: FakeResponse) -> None:
        self.response = response

    def post(self, *_: Any, **__: Any) -> FakeResponse:
        return self.response


def event(**chunk: Any) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": finish}])


def usage(tokens: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 664, "completion_tokens": tokens})


def read(pieces: list[tuple[float, bytes]], **settings: Any) -> Reply:
    clock = Clock()
    return ask(FakeSession(FakeResponse(clock, pieces)), "http://x", {}, clock=clock, **settings)  # type: ignore[arg-type]


ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
DONE = b"data: [DONE]\n\n"


def test_times_are_those_of_tokens() -> None:
    pieces = [(0.9, ROLE), (1.0, token("a")), (1.5, token("b")), (2.5, token("c", "length")), (3.0, usage(3) + DONE)]
    reply = read(pieces, tokens=3)
    assert reply.cause is None
    assert (reply.text, reply.finish, reply.tokens_out, reply.prompt_tokens) == ("abc", "length", 3, 664)
    assert reply.token_times == pytest.approx([1.0, 1.5, 2.5])
    assert reply.ttft == pytest.approx(1.0)
    assert reply.e2e == pytest.approx(2.5)
    assert reply.tpot == pytest.approx(0.75)
    assert reply.gaps == pytest.approx([0.5, 1.0])
    assert reply.end == pytest.approx(3.0)


def test_pieces_with_several_tokens_are_spread_over_the_servers_count() -> None:
    pieces = token("a") + token("b")
    reply = read([(1.0, pieces), (2.0, token("cd", "stop")), (2.0, usage(5) + DONE)])
    assert reply.token_times == pytest.approx([1.0, 1.0, 2.0])
    assert reply.tpot == pytest.approx(0.25)


def test_answer_that_ends_at_once_has_a_first_token() -> None:
    reply = read([(0.1, ROLE), (0.7, token("", "stop")), (0.7, usage(1) + DONE)])
    assert reply.cause is None
    assert reply.ttft == pytest.approx(0.7)
    assert reply.tpot is None


def test_event_split_over_pieces_counts_when_it_is_complete() -> None:
    whole = token("a", "length")
    reply = read([(1.0, whole[:30]), (4.0, whole[30:]), (4.0, usage(1) + DONE)])
    assert reply.ttft == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("pieces", "settings", "cause"),
    [
        ([(1, token("a"))], {}, "stream ended early"),
        ([(1, token("a")), (2, usage(1) + DONE)], {}, "no finish reason"),
        ([(1, token("a", "stop")), (2, DONE)], {}, "no usage"),
        ([(1, token("a", "length")), (2, usage(1) + DONE)], {"tokens": 2}, "wrong length"),
        ([(1, token("a")), (2, event(error={"message": "died"}))], {}, "error in stream"),
        ([(1, b"data: {no json\n\n")], {}, "stream unreadable"),
    ],
)
def test_what_a_stream_can_lack(pieces: list[tuple[float, bytes]], settings: dict, cause: str) -> None:
    assert read(pieces, **settings).cause == cause


@pytest.mark.parametrize("after", [1, 2])
def test_leaving_half_way_is_no_failure(after: int) -> None:
    reply = read([(1, token("a")), (2, token("b")), (3, token("c", "length"))], abort_after=after)
    assert reply.aborted
    assert reply.cause is None
    assert len(reply.token_times) == after


def test_leaving_behind_the_end_is_a_whole_answer() -> None:
    reply = read([(1, token("a", "length")), (2, usage(1) + DONE)], abort_after=1)
    assert not reply.aborted
    assert reply.cause is None


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with stub_server() as running:
        yield running


def send(server: StubServer, question: str, **settings: Any) -> Reply:
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": 6}
    with requests.Session() as session:
        return ask(session, server.url, body, **settings)


@pytest.mark.parametrize(
    ("question", "status", "cause", "detail"),
    [
        ("reject me", 400, "http 400", "eos_retain: no budget"),
        ("crash", 500, "http 500", "oops"),
        ("short", 200, "wrong length", ""),
        ("cut", 200, "stream ended early", ""),
        ("drop", 200, "stream broken", ""),
        ("late error", 200, "error in stream", "engine died"),
    ],
)
def test_causes_over_http(server: StubServer, question: str, status: int, cause: str, detail: str) -> None:
    reply = send(server, question, tokens=6)
    assert (reply.status, reply.cause) == (status, cause)
    assert detail in reply.detail


def test_answer_over_http(server: StubServer) -> None:
    reply = send(server, "What?", tokens=6)
    assert reply.cause is None
    assert reply.text.strip() == "yes"
    assert (reply.tokens_out, reply.prompt_tokens, len(reply.token_times)) == (6, PROMPT_TOKENS, 6)
    assert reply.token_times == sorted(reply.token_times)


def test_leaving_as_soon_as_the_request_is_accepted(server: StubServer) -> None:
    reply = send(server, "What?", abort_after=0)
    assert reply.aborted
    assert reply.token_times == []


def test_nobody_there() -> None:
    reply = ask(requests.Session(), "http://127.0.0.1:9", {})
    assert (reply.status, reply.cause) == (None, "no connection")


def test_silence_is_given_up() -> None:
    with stub_server(pause=5) as slow:
        assert send(slow, "What?", timeout=0.2).cause in ("timeout", "stream broken")


def test_broken_json_is_refused(server: StubServer) -> None:
    assert ask(requests.Session(), server.url, b"{no json").status == 400
