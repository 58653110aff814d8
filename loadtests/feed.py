"""Hands out visits to locust's users, sends their requests, keeps records, and knows when a run is over."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import requests

from loadtests.bodies import body_of, user_message
from loadtests.client import ask as send
from loadtests.images import Picture
from loadtests.questions import read_rows
from loadtests.records import Record, record_of
from loadtests.scenarios import Ask, Visit, visits
from loadtests.settings import Workload


class Feed:
    """The one source of work of a run; all users of a locust process share it."""

    def __init__(self, workload: Workload, out: Path | None, report: Callable[[Record], None]) -> None:
        """Reads the rows; ``out`` takes a JSON line for each request, ``report`` its record.

        Raises:
            SettingError: as :func:`read_rows` and :func:`visits`.
        """
        self.workload = workload
        self.report = report
        self.visits: Iterator[Visit] = visits(workload, read_rows(Path(workload.rows)))
        if workload.requests is not None:
            # A run of known length has its images encoded before the first request, not between two of them.
            planned = list(self.visits)
            for visit in planned:
                for ask in visit.asks:
                    for picture in ask.pictures:
                        picture.data_url()
            self.visits = iter(planned)
        self.start: float | None = None
        self.shown: set[Picture] = set()
        self.active = 0
        self.exhausted = False
        self._out: IO[str] | None = None if out is None else out.open("w")
        self._idle: list[requests.Session] = []

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
        """The next visit; None once the run's requests or its time are up."""
        seconds = self.workload.seconds
        if not self.exhausted and (seconds is None or self.elapsed() < seconds):
            visit = next(self.visits, None)
            if visit is not None:
                return visit
        self.exhausted = True
        return None

    def run(self, visit: Visit, due: float | None = None) -> None:
        """Sends the requests of one visit, each when the one before is answered; ends early where one fails."""
        self.active += 1
        session = self._idle.pop() if self._idle else requests.Session()
        history: list[dict[str, Any]] = []
        carried: tuple[Picture, ...] = ()
        try:
            for i, ask in enumerate(visit.asks):
                message = user_message(ask)
                body = body_of(self.workload, ask, [*history, message])
                late = self.elapsed() - due if due is not None and i == 0 else 0.0
                record, text = self._send(session, ask, body, (*carried, *ask.pictures), late)
                if visit.conversation:
                    if not record.good:
                        return
                    carried += ask.pictures
                    history += [message, {"role": "assistant", "content": text}]
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
        shown = pictures if ask.fault is None else ()
        repeats = sum(picture in self.shown for picture in shown)
        self.shown.update(shown)
        tokens = self.workload.output_tokens if self.workload.fixed_output else None
        started = self.elapsed()
        reply = send(session, self.workload.base_url, body, self.workload.timeout, ask.abort_after, tokens)
        record = record_of(ask, reply, started, late, len(shown), repeats)
        if self._out is not None:
            self._out.write(json.dumps(record.to_dict()) + "\n")
            self._out.flush()
        self.report(record)
        return record, reply.text

    def close(self) -> None:
        """Ends connections and the file of records."""
        for session in self._idle:
            session.close()
        if self._out is not None:
            self._out.close()
