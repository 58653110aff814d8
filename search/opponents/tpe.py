"""Optuna's TPE (Bergstra et al., 2011) over the same space as random search."""

from collections.abc import Sequence
from typing import Any

from eos_search.opponents.base import WIDTH, Candidate, Outcome
from eos_search.opponents.space import Space
from eos_vllm.core.errors import SettingError


class TPE:
    """A study of optuna, asked for a group of trials at a time.

    What fell out of the race is told as pruned, with its score at each number of images: TPE ranks such trials behind
    those that finished, by how far they came.
    """

    def __init__(self, space: Space, seed: int, width: int = WIDTH) -> None:
        """The first group of ``width`` is random.

        Raises:
            SettingError: optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            remedy = "pip install 'eos-vllm[search]', or take random or one-knob"
            raise SettingError("method", "tpe", "it needs optuna, which is not installed", remedy) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.width = space, width
        self.states: Any = optuna.trial.TrialState
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=width)
        self.study: Any = optuna.create_study(direction="maximize", sampler=sampler)
        self.asked: list[Any] = []

    def propose(self) -> list[Candidate]:
        """As :class:`~eos_search.opponents.base.Opponent`."""
        self.asked = []
        group = []
        for _ in range(self.width):
            # One after another: the sampler keeps away from trials of the group whose values it knows.
            self.asked.append(self.study.ask())
            group.append(Candidate(self.space.draw(_Suggested(self.asked[-1]))))
        return group

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """As :class:`~eos_search.opponents.base.Opponent`."""
        for trial, outcome in zip(self.asked, outcomes, strict=True):
            for rung, score in enumerate(outcome.scores):
                trial.report(score, rung)
            if outcome.finished:
                self.study.tell(trial, outcome.scores[-1])
            else:
                self.study.tell(trial, state=self.states.PRUNED)


class _Suggested:
    """Values that a trial of optuna suggests."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def number(self, name: str, low: float, high: float, log: bool = False) -> float:
        return self.trial.suggest_float(name, low, high, log=log)

    def whole(self, name: str, low: int, high: int) -> int:
        return self.trial.suggest_int(name, low, high)

    def one_of(self, name: str, options: Sequence[str]) -> str:
        return self.trial.suggest_categorical(name, list(options))
