"""A whole search by an opponent: from settings to ``theta.json``, and on from where it was stopped."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_search.accuracy import Share
from eos_search.answerers import Answerer, ReferenceAnswerer
from eos_search.export import write_json
from eos_search.frozen import model_path, model_sizes
from eos_search.opponents.base import Candidate, Opponent
from eos_search.opponents.judge import Judge, Judged
from eos_search.opponents.log import TrialLog
from eos_search.opponents.one_knob import OneKnob, hand_made
from eos_search.opponents.racing import race, rungs
from eos_search.opponents.random_search import RandomSearch
from eos_search.opponents.settings import SPLIT, OpponentSettings
from eos_search.opponents.space import Space
from eos_search.opponents.tpe import TPE
from eos_search.process import stop_signals
from eos_search.raw import fingerprint, weights_digest
from eos_search.run_folder import RUN, SETTINGS, RunFolder
from eos_vllm.cluttervqa import Row, export, read_rows, version_of
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import ModelSpec, Profile, parse_profile
from eos_vllm.models.geometry import ModelGeometry
from eos_vllm.provenance import provenance

Told = Callable[[str], Callable[[int], Any]]


class StoppedError(KeyboardInterrupt):
    """A search that was stopped by Ctrl-C or SIGTERM; its log is there to go on from."""

    def __init__(self, trials: int) -> None:
        super().__init__(trials)
        self.message = f"stopped after {trials} trials; go on from there with --resume"


@dataclass(frozen=True)
class OpponentResult:
    """The best profile, its file, what it came to by cost, and whether the budget ended the search."""

    profile: Profile
    path: Path
    best: Judged
    accuracy: dict[str, Share]
    trials: int
    spent: bool


def run_opponent(
    settings: OpponentSettings,
    out: Path,
    resume: bool = False,
    processes: int | None = None,
    told: Told = lambda _: lambda _n: None,
    answerer: Answerer | None = None,
) -> OpponentResult:
    """Lets an opponent search, and writes ``theta.json``, ``run.json`` and the log of all trials.

    With a budget of questions ``theta.json`` has the same bytes however often the search was stopped.

    Args:
        settings: all that the result depends on.
        out: folder of the search.
        resume: go on from its log.
        processes: that answer; one for each core where None.
        told: as ``progress`` of :func:`eos_search.evaluation.evaluate`.
        answerer: who answers in place of the reference; closed by the caller.

    Raises:
        EosError: a model or cost that cannot be, a folder that is taken, or one to resume that holds something else.
        StoppedError: Ctrl-C or SIGTERM came.
    """
    path, sizes = model_path(settings.model), model_sizes(settings.model)
    settings.check_model(sizes.visual_tokens or 0)
    opponent = make_opponent(settings, sizes)
    if (weights := weights_digest(path)) is None:
        raise SettingError("model", settings.model, "it holds no *.safetensors", "name the directory of a whole model")
    if not resume:
        RunFolder(out, is_main=True).check_new()
    with tempfile.TemporaryDirectory(prefix="eos-rows-") as folder:
        rows = validation_rows(Path(folder) / "rows", settings)
        about = settings.to_dict() | {"weights": weights, "rows": fingerprint(rows)}
        _check_folder(out, about, resume)
        own = answerer or ReferenceAnswerer(path, settings.max_tokens, processes)
        try:
            steps = rungs(settings.first_images, settings.images)
            judge = Judge(rows, steps, settings.costs, own, settings.budget, TrialLog(out), told)
            spent = _race(opponent, judge, len(steps))
        finally:
            if answerer is None and isinstance(own, ReferenceAnswerer):
                own.close()
        return _export(settings, out, judge, steps, about, spent)


def make_opponent(settings: OpponentSettings, sizes: ModelGeometry) -> Opponent:
    """The opponent that the settings name.

    Raises:
        SettingError: no profile of the space can have the cost; or optuna is missing.
    """
    if settings.method == "one-knob":
        found = OneKnob(hand_made(sizes), settings.costs, settings.queries, settings.seed, settings.minimums)
        if not found.bases:
            problem = "no packaged profile can meet it with this model"
            raise SettingError("cost", min(settings.costs), problem, "give more, or take random or tpe")
        return found
    model = ModelSpec(
        architecture=sizes.architecture,
        num_decoder_layers=sizes.num_decoder_layers,
        visual_tokens=sizes.visual_tokens,
    )
    space = Space(model, settings.costs, settings.max_reducers, settings.selectors, settings.queries, settings.minimums)
    return (TPE if settings.method == "tpe" else RandomSearch)(space, settings.seed)


def validation_rows(folder: Path, settings: OpponentSettings) -> list[Row]:
    """The questions that choose, written to a new folder."""
    return read_rows(export(folder, SPLIT, settings.images, version=settings.benchmark_version))


def _check_folder(out: Path, about: dict[str, Any], resume: bool) -> None:
    file = out / SETTINGS
    if not resume:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, about)
        except OSError as error:
            problem = f"it cannot be written to ({error.strerror})"
            raise SettingError("out", str(out), problem, "name another folder") from None
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name, value in about.items() if before.get(name, ...) != value]
    except (OSError, ValueError, AttributeError):
        remedy = "leave out --resume, or name the folder of a search"
        raise SettingError("out", str(out), "it holds no search to go on with", remedy) from None
    if different:
        name = different[0]
        problem = f"the search in {out} has {name}={before.get(name)!r}"
        raise SettingError(name, about[name], problem, "give the same settings, or another folder")


def _race(opponent: Opponent, judge: Judge, steps: int) -> bool:
    try:
        with stop_signals() as asked:

            def score(number: int, candidate: Candidate, rung: int) -> float:
                if asked:
                    raise StoppedError(judge.trials)
                return judge.score(number, candidate, rung)

            return race(opponent, score, steps)
    except KeyboardInterrupt:  # of a process that answers, or a second one of this
        raise StoppedError(judge.trials) from None


def _export(
    settings: OpponentSettings,
    out: Path,
    judge: Judge,
    steps: tuple[int, ...],
    about: dict[str, Any],
    spent: bool,
) -> OpponentResult:
    best = judge.best
    assert best is not None  # the first candidate is judged whatever the budget
    seconds = round(judge.cpu_seconds, 3)
    found = judge.accuracy()
    run, title = provenance(seed=settings.seed), version_of(settings.benchmark_version).title
    facts = {
        "command": settings.command_line(),
        "git": run["git"],
        "versions": run["versions"],
        "seed": settings.seed,
        "method": settings.method,
        "settings": about,
        "trials": judge.trials,
        "questions": judge.questions,
        "trial": best.trial,
        "about": dict(best.candidate.about),
        "validation": {
            "source": f"{title} {SPLIT}",
            "images": steps[best.rung],
            "score": best.score,
            "by_cost": {cost: asdict(share) for cost, share in found.items()},
        },
    }
    if settings.budget.seconds is not None:  # else they would be all that tells two sittings from one
        facts["cpu_seconds"] = seconds
    profile = parse_profile({**best.candidate.profile.to_dict(), "name": settings.name, "provenance": facts})
    counts = {"trials": judge.trials, "questions": judge.questions, "spent": spent}
    write_json(out / RUN, {"search": run, "device": "cpu", "cpu_seconds": seconds, **counts})
    theta = RunFolder(out, is_main=True).theta
    write_json(theta, profile.to_dict())
    return OpponentResult(profile, theta, best, found, judge.trials, spent)
