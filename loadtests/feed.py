"""Hands out visits to locust's users, sends their requests, keeps records, and knows when a run is over."""

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import requests

from loadtests.bodies import body_of, system_message, user_message
from loadtests.client import Reply
from loadtests.client import ask as send
from loadtests.images import Picture
from loadtests.questions import read_rows
from loadtests.records import Record, record_of
from loadtests.scenarios import Ask, Visit, starter, visits
from loadtests.settings import Workload
from loadtests.window import Window


class Feed:
    """The one source of work of a run; all users of a locust process share it."""

    def __init__(self, workload: Workload, out: Path | None, report: Callable[[Record], None]) -> None:
        """Reads the rows and encodes images; ``out`` takes a JSON line for each request, ``report`` its record.

        Raises:
            SettingError: as :func:`read_rows` and :func:`visits`.
        """
        self.workload = workload
        self.report = report
        self.window = None if workload.window is None else Window(workload)
        self.visits = self._prepared(visits(workload, read_rows(Path(workload.rows))))
        self.start: float | None = None
        self.shown: set[tuple[Path, str]] = set()
        self.active = 0
        self.late_encodings = 0
        self.exhausted = False
        self._handed_out = 0
        self._out: IO[str] | None = None if out is None else out.open("w")
        self._idle: list[requests.Session] = []

    def _prepared(self, planned: Iterator[Visit]) -> Iterator[Visit]:
        """Encodes images before the first request, not between two of them; their bodies stay with their visits."""
        count = self.workload.prepare if self.workload.requests is None else None
        ready = deque(itertools.islice(planned, count))
        for visit in ready:
            for ask in visit.asks:
                for picture in ask.pictures:
                    _ = picture.encoded
        # What was handed out is let go.
        return itertools.chain(iter(lambda: ready.popleft() if ready else None, None), planned)

    @property
    def over(self) -> bool:
        """Whether nothing is left to send and nothing is waited for."""
        return self.exhausted and self.active == 0

    def elapsed(self) -> float:
        """Seconds since the run's first request."""
        if self.start is None:
            self.start = time.perf_counter()
        return time.perf_counter() - self.start

    def next(self) -> Visit | None:
        """The next visit; None once the run's requests, its time or its window are up."""
        seconds = self.workload.seconds
        if not self.exhausted and (seconds is None or self.elapsed() < seconds):
            visit = next(self.visits, None)
            if visit is not None:
                user, self._handed_out = self._handed_out, self._handed_out + 1
                steady = self.window is not None and self.workload.rate is None
                if steady and user < self.workload.concurrency:
                    return starter(visit, user, self.workload.concurrency, self.workload.output_tokens)
                return visit
        self.exhausted = True
        return None

    def tick(self) -> bool:
        """Lets the window know the time; True once it is closed."""
        if self.window is None:
            return False
        self.window.tick(self.elapsed())
        self.exhausted = self.exhausted or self.window.closed is not None
        return self.window.closed is not None

    def run(self, visit: Visit, due: float | None = None) -> None:
        """Sends the requests of one visit, each when the one before is answered; ends early where one fails."""
        self.active += 1
        session = self._idle.pop() if self._idle else requests.Session()
        # A router in front keeps a visit on its replica, and spreads visits, by this alone.
        session.headers["X-Session-ID"] = f"{self.workload.label}-{visit.asks[0].number}"
        history: list[dict[str, Any]] = []
        carried: tuple[Picture, ...] = ()
        try:
            for i, ask in enumerate(visit.asks):
                self.late_encodings += sum(not picture.is_encoded for picture in ask.pictures)
                message = user_message(ask)
                body = body_of(self.workload, ask, [*system_message(ask), *history, message])
                late = self.elapsed() - due if due is not None and i == 0 else 0.0
                record, text = self._send(session, ask, body, (*carried, *ask.pictures), late)
                if visit.conversation:
                    if not record.good:
                        break
                    carried += ask.pictures
                    history += [message, {"role": "assistant", "content": text}]
            if self.window is not None:
                self.window.visit_over(self.elapsed())
                self.tick()
        finally:
            self._idle.append(session)
            self.active -= 1

    def _send(
        self,
        session: requests.Session,
        ask: Ask,
        body: dict[str, Any] | bytes,
        pictures: tuple[Picture, ...],
        late: float,
    ) -> tuple[Record, str]:
        # A broken request shows its pictures to nobody.
        shown = [(p.path, p.stamp) for p in pictures] if ask.fault is None else []
        repeats = sum(picture in self.shown for picture in shown)
        self.shown.update(shown)
        fixed = ask.output_tokens or self.workload.output_tokens
        tokens = fixed if self.workload.fixed_output else None
        reply, started, cut = Reply(), self.elapsed(), True
        try:
            send(session, self.workload.base_url, body, self.workload.timeout, ask.abort_after, tokens, reply=reply)
            cut = False
        finally:
            # A user that is stopped in the middle leaves through here.
            if cut:
                reply.end = self.elapsed() - started
            record = record_of(ask, reply, started, late, len(shown), repeats, cut)
            self._keep(record)
        return record, reply.text

    def _keep(self, record: Record) -> None:
        if self._out is not None:
            self._out.write(json.dumps(record.to_dict()) + "\n")
            self._out.flush()
        self.report(record)
        if self.window is not None and not record.cut:
            if record.good:
                self.window.answered()
            if record.starter:
                self.window.first_over(self.elapsed())

    def close(self) -> None:
        """Ends connections and the file of records."""
        for session in self._idle:
            session.close()
        if self._out is not None:
            self._out.close()
