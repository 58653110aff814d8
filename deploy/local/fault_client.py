"""Clients of the faults: streamed questions whose right answers are known, and what became of each.

An outcome is one of ``right``, ``wrong``, ``told …`` (an HTTP status, an error in the stream, or a connection that
broke in a way that HTTP clients report), ``truncated`` (a stream that ended as if it were whole, without finish reason
or ``[DONE]``) and ``hung`` (not over within the limit). With ``right`` and ``told`` nothing is lost silently.
"""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from eos_vllm.cluttervqa import is_right, make_sample
from eos_vllm.models.images import to_data_url
from loadtests.sse import EventParser

LIMIT_SECONDS = 180.0
LONG = 48
# Who was refused does not ask again at once.
BACK_OFF_SECONDS = 1.0
LOST_SILENTLY = ("wrong", "truncated", "hung")


@dataclass(frozen=True)
class Case:
    """A question about an image, and its right answer."""

    image: str
    question: str
    answer: str

    def body(self, long: bool) -> dict[str, Any]:
        """The request; a long one goes on behind its answer, for streams that a fault can cut."""
        image = {"type": "image_url", "image_url": {"url": self.image}}
        content = [image, {"type": "text", "text": self.question}]
        body = {"model": "embedded", "messages": [{"role": "user", "content": content}], "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": LONG if long else 8}
        return body | ({"ignore_eos": True} if long else {})


def cases(seed: int, count: int) -> list[Case]:
    """Questions of ClutterVQA's test split, one for each image, from image ``1000 * seed``."""
    found = []
    for number in range(1000 * seed, 1000 * seed + count):
        sample = make_sample("test", number, questions=1)
        found.append(Case(to_data_url(sample.image), sample.questions[0].text, sample.questions[0].answer))
    return found


@dataclass
class Outcome:
    """What became of a request; times are of ``time.monotonic``."""

    kind: str
    sent: float
    ended: float = 0.0
    first: float | None = None
    detail: str = ""


@dataclass
class Answer:
    """A stream as it came."""

    text: str = ""
    finish: str | None = None
    done: bool = False
    tokens: int | None = None
    error: str = ""
    status: int | None = None
    first: float | None = None

    def take(self, event: str) -> None:
        """One event."""
        if event == "[DONE]":
            self.done = True
            return
        chunk = json.loads(event)
        if error := chunk.get("error"):
            self.error, self.status = str(error), error.get("code")
            return
        if usage := chunk.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or ""
            if text and self.first is None:
                self.first = time.monotonic()
            self.text += text
            self.finish = choice.get("finish_reason") or self.finish

    def kind(self, case: Case, long: bool) -> str:
        """The outcome of a stream that came to its end by HTTP's rules."""
        if self.error:
            return f"told status {self.status} in the stream"
        if self.finish is None or not self.done:
            return "truncated"
        if long:
            whole = self.tokens == LONG and self.finish == "length"
            return "right" if whole and self.text.strip().lower().startswith(case.answer.lower()) else "wrong"
        return "right" if is_right(self.text, case.answer) else "wrong"


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    case: Case,
    name: str,
    long: bool,
    limit: float = LIMIT_SECONDS,
    answer: Answer | None = None,
) -> Outcome:
    """Sends one question and reads its stream into ``answer`` to the end, or for ``limit`` seconds."""
    outcome, answer = Outcome("hung", time.monotonic()), answer or Answer()
    try:
        async with asyncio.timeout(limit):
            headers = {"X-Session-ID": name}
            async with session.post(f"{url}/v1/chat/completions", json=case.body(long), headers=headers) as response:
                if response.status != 200:
                    outcome.kind = f"told status {response.status}"
                    outcome.detail = (await response.text())[:300]
                else:
                    parser = EventParser()
                    async for piece in response.content.iter_any():
                        for event in parser.feed(piece):
                            answer.take(event)
                    outcome.kind = answer.kind(case, long)
                    outcome.detail = answer.error or ("" if outcome.kind == "right" else answer.text)
    except TimeoutError:
        outcome.detail = f"no end within {limit:.0f} s; text so far: {answer.text!r}"
    except aiohttp.ClientPayloadError as e:
        outcome.kind, outcome.detail = "told stream broken", str(e)[:300]
    except (aiohttp.ClientError, OSError) as e:
        outcome.kind, outcome.detail = "told connection broken", f"{type(e).__name__}: {e}"[:300]
    outcome.ended, outcome.first = time.monotonic(), answer.first
    return outcome


@dataclass
class Crowd:
    """Clients that each have a request under way at all times until ``hold`` is set; then all are waited for.

    Attributes:
        outcomes: of all requests that are over.
    """

    url: str
    cases: list[Case]
    size: int
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._answers: dict[int, Answer] = {}
        self.hold = asyncio.Event()
        self._numbers: Iterator[int] = itertools.count()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._answers)

    @property
    def streaming(self) -> int:
        """Those of them whose answers have begun."""
        return sum(answer.first is not None for answer in self._answers.values())

    async def run(self) -> None:
        """All clients, to the end of the last request."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            await asyncio.gather(*(self._client(session) for _ in range(self.size)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.hold.is_set():
            number = next(self._numbers)
            case, answer, name = self.cases[number % len(self.cases)], Answer(), f"client-{number}"
            self._answers[number] = answer
            try:
                outcome = await ask(session, self.url, case, name, long=number % 2 == 0, answer=answer)
                self.outcomes.append(outcome)
            finally:
                del self._answers[number]
            if outcome.kind.startswith("told"):
                await asyncio.sleep(BACK_OFF_SECONDS)

    def counts(self, since: float = 0.0) -> dict[str, int]:
        """Requests by outcome, of those that ended after ``since``."""
        return dict(sorted(Counter(o.kind for o in self.outcomes if o.ended >= since).items()))


async def known_right(url: str, wanted: list[Case]) -> list[Case]:
    """Those questions that the server answers right when it has nothing else to do: what is wrong later is the fault's.

    Asked one after the other, long and short.
    """
    right = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for number, case in enumerate(wanted):
            both = [await ask(session, url, case, f"known-{number}", long) for long in (False, True)]
            if all(outcome.kind == "right" for outcome in both):
                right.append(case)
    return right
