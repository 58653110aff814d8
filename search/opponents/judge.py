"""Who marks an opponent's profiles: the evaluation's own answerer on validation questions, within a budget."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eos_search.accuracy import AVERAGE, Share, accuracy, mean_accuracy
from eos_search.answerers import Answerer, Case
from eos_search.evaluation import describe
from eos_search.opponents.base import Candidate
from eos_search.opponents.log import TrialLog
from eos_search.opponents.racing import SpentError
from eos_search.raw import behaviour
from eos_vllm.cluttervqa import Row


@dataclass(frozen=True)
class Budget:
    """What an opponent may spend: CPU-seconds, or questions, each counted once for every cost that it is asked at."""

    seconds: float | None = None
    questions: int | None = None


@dataclass(frozen=True)
class Judged:
    """A candidate's best rung so far: its trial, how many rungs lie behind it, and its score there."""

    candidate: Candidate
    trial: int
    rung: int
    score: float


class Judge:
    """Scores candidates: mean over the costs of the accuracy on the images of a rung.

    What the log holds of an earlier sitting is not asked again.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        images: Sequence[int],
        costs: Sequence[int],
        answerer: Answerer,
        budget: Budget,
        log: TrialLog,
        told: Callable[[str], Callable[[int], Any]] = lambda _: lambda _n: None,
    ) -> None:
        """Begins to count CPU-seconds: those of this process, and those that answers took wherever they were made.

        Args:
            rows: validation questions, image by image.
            images: how many of the first images each rung has, ascending.
            costs: layer averages in tokens.
            answerer: who answers; what it says of its own ``cpu_seconds`` counts.
            budget: what may be spent; the last profile may go beyond it.
            log: of this search.
            told: as ``progress`` of :func:`eos_search.evaluation.evaluate`.
        """
        self.rows, self.costs, self.answerer, self.budget, self.log = rows, tuple(costs), answerer, budget, log
        self.edges = [rows_of_first(rows, count) for count in images]
        self.told = told
        self.questions, self.trials = 0, 0
        self.best: Judged | None = None
        self._earlier, self._started = log.cpu_seconds, self._clock()
        self._repeats = self._earlier > 0
        self._replies: dict[int, list[list[str]]] = {}

    @property
    def cpu_seconds(self) -> float:
        """CPU-seconds so far, those of earlier sittings included."""
        return self._earlier + self._clock() - self._started

    def score(self, number: int, candidate: Candidate, rung: int) -> float:
        """Mean accuracy of trial ``number`` on the images of a rung, 0 to 1; rungs before it have been scored.

        Raises:
            SpentError: the budget is spent.
            SettingError: the log holds another profile as this trial.
        """
        record = self.log.earlier(number, rung, behaviour(candidate.profile))
        if record is None:
            if self._repeats:  # what led here was counted in the sitting that did it first
                self._started, self._repeats = self._clock(), False
            if self._is_spent():
                raise SpentError
            record = self._ask(number, candidate, rung)
        self.questions += record["questions"]
        self.trials = max(self.trials, number + 1)
        before = self._replies.get(number, [[] for _ in self.costs])
        replies = [a + b for a, b in zip(before, record["replies"], strict=True)]
        self._replies[number] = replies
        rows = self.rows[: self.edges[rung]]
        score = statistics.fmean(mean_accuracy(rows, each) for each in replies)
        if self.best is None or (rung, score) > (self.best.rung, self.best.score):
            self.best = Judged(candidate, number, rung, score)
        return score

    def accuracy(self) -> dict[str, Share]:
        """Accuracy of the best candidate by cost, with intervals that no search has to pay for."""
        assert self.best is not None  # the first candidate is judged whatever the budget
        rows, replies = self.rows[: self.edges[self.best.rung]], self._replies[self.best.trial]
        return {str(cost): accuracy(rows, each)[AVERAGE] for cost, each in zip(self.costs, replies, strict=True)}

    def _ask(self, number: int, candidate: Candidate, rung: int) -> dict[str, Any]:
        rows = self.rows[self.edges[rung - 1] if rung else 0 : self.edges[rung]]
        cases = [Case(f"trial {number}", candidate.profile, cost) for cost in self.costs]
        told = [describe(case) for case in cases]
        replies = self.answerer.answer(rows, cases, self.told(cases[0].name))
        return self.log.add(
            {
                "trial": number,
                "rung": rung,
                "about": dict(candidate.about),
                "profile": behaviour(candidate.profile),
                "kept": [about["kept"] for about in told],
                "layer_average": [about["layer_average"] for about in told],
                "questions": len(rows) * len(cases),
                "replies": replies,
                "cpu_seconds": round(self.cpu_seconds, 3),
            }
        )

    def _is_spent(self) -> bool:
        seconds, questions = self.budget.seconds, self.budget.questions
        return (seconds is not None and self.cpu_seconds >= seconds) or (
            questions is not None and self.questions >= questions
        )

    def _clock(self) -> float:
        return time.process_time() + getattr(self.answerer, "cpu_seconds", 0.0)


def rows_of_first(rows: Sequence[Row], images: int) -> int:
    """How many rows are about the first so many images; rows of an image follow one another."""
    seen: set[Any] = set()
    for i, row in enumerate(rows):
        seen.add(row.image_files)
        if len(seen) > images:
            return i
    return len(rows)
