"""One streaming chat completion over HTTP, timed token by token, and what went wrong with it if anything did.

It uses ``requests`` rather than locust's own clients: urllib3 hands over each chunk of a stream when it arrives, while
FastHttpUser's reader waits until its buffer is full, which would move the first token to the end of the answer.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import requests

from loadtests.sse import EventParser

PATH = "/v1/chat/completions"
CONNECT_SECONDS = 30
_DETAIL = 300


@dataclass
class Reply:
    """What came of one request. All times are seconds since it was sent.

    Attributes:
        status: HTTP status, None if no answer came at all.
        token_times: when each piece of the answer arrived; a piece holds at least one token, mostly just one.
        text: the answer.
        finish: vLLM's reason for ending it (``stop``, ``length``).
        prompt_tokens: tokens of the prompt by the server's count, visual ones included.
        tokens_out: tokens of the answer by the server's count.
        end: when the request was over, for better or worse.
        cause: why it failed, in a few words that can be counted; None if it was answered in full.
        detail: what the server said of it.
        aborted: the client itself closed the stream, as it was told to; that is no failure.
    """

    status: int | None = None
    token_times: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    tokens_out: int | None = None
    end: float = 0.0
    cause: str | None = None
    detail: str = ""
    aborted: bool = False

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return self.token_times[0] if self.token_times else None

    @property
    def e2e(self) -> float | None:
        """Time to the last token; what the server sends behind it (usage) is no part of the answer."""
        return self.token_times[-1] if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for answers of one token."""
        if self.tokens_out is None or self.tokens_out < 2 or not self.token_times:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.tokens_out - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: from each piece of the answer to the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times)]


def ask(
    session: requests.Session,
    base_url: str,
    body: dict[str, Any] | bytes,
    timeout: float = 600,
    abort_after: int | None = None,
    tokens: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    reply: Reply | None = None,
) -> Reply:
    """Sends one streaming chat completion and reads it to its end; never raises for what a server may do.

    Args:
        session: connections are kept in it.
        base_url: the server, without ``/v1``.
        body: the request, or raw bytes where it is meant to be broken.
        timeout: seconds without a byte from the server after which it is given up.
        abort_after: close the stream after so many pieces of the answer; 0: as soon as the request is accepted.
        tokens: length that the answer must have by the server's count, where it is fixed.
        clock: seconds.
        reply: is filled and returned; a caller that may be stopped in between has in it what came until then.
    """
    reply = Reply() if reply is None else reply
    start = clock()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    try:
        with session.post(
            base_url + PATH, data=data, headers=headers, stream=True, timeout=(CONNECT_SECONDS, timeout)
        ) as response:
            reply.status = response.status_code
            if response.status_code != 200:
                reply.cause, reply.detail = f"http {response.status_code}", _message(response)
            elif abort_after == 0:
                reply.aborted = True
            else:
                _read(reply, response, abort_after, lambda: clock() - start)
                if reply.cause is None and not reply.aborted:
                    reply.cause = _incomplete(reply, tokens)
    except (requests.RequestException, ValueError, KeyError, TypeError, OSError) as error:
        reply.cause, reply.detail = _cause(error, reply), str(error)[:_DETAIL]
    reply.end = clock() - start
    return reply


def _pieces(response: requests.Response) -> Iterator[bytes]:
    # chunk_size=None: each chunk as it comes. A body that isn't chunked would be read whole by that.
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    return response.iter_content(chunk_size=None if chunked else 1)


def _read(reply: Reply, response: requests.Response, abort_after: int | None, elapsed: Callable[[], float]) -> None:
    """Fills ``reply`` from the stream."""
    parser, done = EventParser(), False
    for piece in _pieces(response):
        now = elapsed()
        for event in parser.feed(piece):
            if event == "[DONE]":
                done = True
                continue
            _take(reply, json.loads(event), now)
            if reply.cause is not None:
                return
            if abort_after is not None and len(reply.token_times) >= abort_after and reply.finish is None:
                reply.aborted = True
                return
    if not done:
        reply.cause = "stream ended early"


def _take(reply: Reply, chunk: dict[str, Any], now: float) -> None:
    """Takes over one chunk of a stream."""
    if error := chunk.get("error"):
        reply.cause, reply.detail = "error in stream", str(error)[:_DETAIL]
        return
    if usage := chunk.get("usage"):
        reply.prompt_tokens, reply.tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    for choice in chunk.get("choices") or ():
        text = (choice.get("delta") or {}).get("content") or ""
        reply.text += text
        reply.finish = choice.get("finish_reason") or reply.finish
        # The chunk that only names the role is no token; one that ends the answer stands for its end token.
        if text or choice.get("finish_reason"):
            reply.token_times.append(now)


def _incomplete(reply: Reply, tokens: int | None) -> str | None:
    """What a stream that ended well still lacks."""
    if reply.finish is None:
        return "no finish reason"
    if reply.tokens_out is None:
        return "no usage"
    if tokens is not None and reply.tokens_out != tokens:
        return "wrong length"
    return None


def _message(response: requests.Response) -> str:
    try:
        error = response.json()
        error = error.get("error", error)
        return str(error.get("message", error))[:_DETAIL]
    except (ValueError, AttributeError):
        return response.text[:_DETAIL]


def _cause(error: Exception, reply: Reply) -> str:
    if isinstance(error, requests.Timeout):
        return "timeout"
    if reply.status is None:
        return "no connection" if isinstance(error, requests.ConnectionError | OSError) else "no answer"
    return "stream broken" if isinstance(error, requests.RequestException | OSError) else "stream unreadable"
