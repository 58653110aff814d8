"""What is kept of each request, in locust's process and in the raw results."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loadtests.client import Reply
from loadtests.questions import is_right
from loadtests.scenarios import Ask

_DIGITS = 5


@dataclass(frozen=True)
class Record:
    """One request, as it went. Times are seconds; ``started`` counts from the run's start, the others from ``started``.

    Attributes:
        number: place in the run's plan.
        scenario: kind of its visit.
        budget: retain budget that it named.
        images: images sent with it, those of earlier turns included.
        repeats: how many of them the run had sent before.
        started: when it was sent.
        late: how much later that was than an open loop wanted it.
        end: when it was over.
        times: when each piece of the answer arrived.
        status: HTTP status.
        prompt_tokens: by the server's count.
        tokens_out: by the server's count.
        finish: reason for the answer's end.
        cause: of its failure; None where all is well.
        detail: what the server said of it.
        aborted: the client left on purpose.
        fault: what was wrong with it on purpose.
        right: whether the answer was right, None where nobody knows.
        question: place in its visit, from 1.
        starter: the shortened first request of a user, which no latency counts.
        cut: still on its way when the run's window closed; that is no failure.
    """

    number: int
    scenario: str
    budget: int | None
    images: int
    repeats: int
    started: float
    late: float
    end: float
    times: tuple[float, ...]
    status: int | None
    prompt_tokens: int | None
    tokens_out: int | None
    finish: str | None
    cause: str | None
    detail: str
    aborted: bool
    fault: str | None
    right: bool | None
    question: int = 1
    starter: bool = False
    cut: bool = False

    @property
    def good(self) -> bool:
        """A request that was meant well, stayed to the end and was answered in full."""
        return self.cause is None and not self.aborted and self.fault is None and not self.cut

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return self.times[0] if self.times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first."""
        if self.tokens_out is None or self.tokens_out < 2 or not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (self.tokens_out - 1)

    @property
    def finished(self) -> float:
        """When its last token came, on the run's clock."""
        return self.started + (self.times[-1] if self.times else self.end)

    @property
    def from_due(self) -> float | None:
        """Time to first token from when the request was due, whatever kept the client from sending it then."""
        return None if self.ttft is None else self.late + self.ttft

    def compact(self) -> dict[str, Any]:
        """For raw results in bulk: of the tokens' times the first and the last, and nothing that is as expected."""
        kept: dict[str, Any] = {"number": self.number, "scenario": self.scenario, "question": self.question}
        kept |= {"started": round(self.started, 4), "end": round(self.end, 4)}
        if self.times:
            kept["times"] = [round(self.times[0], 4), round(self.times[-1], 4)]
        kept |= {"prompt_tokens": self.prompt_tokens, "tokens_out": self.tokens_out, "late": round(self.late, 4)}
        if self.cause is not None:
            kept |= {"cause": self.cause, "detail": self.detail, "status": self.status}
        kept |= {"starter": self.starter, "cut": self.cut}
        if self.right is not None:
            kept["right"] = int(self.right)  # a False would be left out
        return {key: value for key, value in kept.items() if value is not None and value is not False and value != ""}

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is empty is left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", ())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """The other way."""
        zero = {"times": (), "detail": "", "late": 0.0, "images": 0, "repeats": 0, "starter": False, "cut": False}
        empty: dict[str, Any] = {f.name: None for f in fields(cls)} | zero
        return cls(**(empty | values | {"times": tuple(values.get("times", ()))}))


def record_of(
    ask: Ask, reply: Reply, started: float, late: float, images: int, repeats: int, cut: bool = False
) -> Record:
    """Joins what was asked and what came of it; a broken request has failed if it was not refused as the sender's."""
    cause = reply.cause
    if ask.fault is not None:
        refused = reply.status is not None and 400 <= reply.status < 500
        cause = None if refused else f"{ask.fault} not refused ({reply.cause or reply.status})"
    cause = None if cut else cause
    good = cause is None and ask.fault is None and not reply.aborted and not cut
    return Record(
        number=ask.number,
        scenario=ask.scenario,
        budget=ask.budget,
        images=images,
        repeats=repeats,
        started=round(started, _DIGITS),
        late=round(late, _DIGITS),
        end=round(reply.end, _DIGITS),
        times=tuple(round(t, _DIGITS) for t in reply.token_times),
        status=reply.status,
        prompt_tokens=reply.prompt_tokens,
        tokens_out=reply.tokens_out,
        finish=reply.finish,
        cause=cause,
        detail=reply.detail if cause is not None else "",
        aborted=reply.aborted,
        fault=ask.fault,
        right=is_right(reply.text, ask.answer) if good else None,
        question=ask.question,
        starter=ask.starter,
        cut=cut,
    )


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file, in the order of the run's plan."""
    records = [Record.from_dict(json.loads(line)) for line in path.read_text().splitlines()]
    return sorted(records, key=lambda r: r.number)
