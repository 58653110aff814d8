"""A whole search: from settings to the searched profile."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from eos_search.data import Data, load_data
from eos_search.estimators.choice import keep_estimator
from eos_search.estimators.differences import Differences
from eos_search.examples import Encoder
from eos_search.export import search_provenance, searched_profile, write_json
from eos_search.frozen import Frozen, load_frozen
from eos_search.loop import StepSampler, Trainer
from eos_search.objective import Objective
from eos_search.process import deterministic, leave_signals_to_the_main_process, stop_signals
from eos_search.progress import Say, needs_no_bar, record_of, say_aloud, say_nothing, show
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.run_folder import RUN, RunFolder, read_records
from eos_search.schedules import Counts, fit_schedules
from eos_search.settings import SearchSettings
from eos_search.space import search_space
from eos_search.spent import SpentTime, earlier_seconds
from eos_search.structure import Rules, Structure
from eos_search.task import EncodedRows, ModelTask
from eos_search.theta import Theta, ThetaValues
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.provenance import provenance


class Interrupted(KeyboardInterrupt):
    """A search that was stopped by Ctrl-C or SIGTERM; a checkpoint of ``step`` is there to go on from."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step
        self.message = f"stopped before step {step}; go on from there with --resume"


class Paused(Exception):
    """A search that has reached the step before which it was to pause; a checkpoint of it is there."""


@dataclass(frozen=True)
class SearchResult:
    """The searched profile, its file, and the record of every step (:func:`eos_search.run_folder.read_records`)."""

    profile: Profile
    path: Path
    records: list[dict[str, Any]]


def run_search(
    settings: SearchSettings, resume: bool = False, quiet: bool = False, pause: int | None = None
) -> SearchResult:
    """Searches, and writes ``theta.json``, logs and checkpoints to the output folder.

    Args:
        settings: all of it.
        resume: go on from the last checkpoint of the output folder; the result is the same as without the stop.
        quiet: no progress bar and no lines.
        pause: stop before this step, which lies behind the last checkpoint; behind the last step: before the profile.

    Raises:
        Paused: it has been reached.
        SettingError: something in the settings, the data, the model or the output folder is wrong.
        DivergedError: a loss or gradient is no number.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint is written.
    """
    accelerator = Accelerator(cpu=settings.device == "cpu")
    say = say_aloud if accelerator.is_main_process and not quiet else say_nothing
    folder = RunFolder(settings.output, accelerator.is_main_process)
    if resume:
        folder.check_resumes(settings)
        folder.check_device(str(accelerator.device))
    else:
        folder.check_new()
    if settings.batch_size % accelerator.num_processes:
        problem = f"it cannot be shared by {accelerator.num_processes} processes"
        raise SettingError("batch_size", settings.batch_size, problem, "give a multiple of their number")
    set_seed(settings.seed)
    with deterministic():
        frozen = load_frozen(settings, accelerator.device)
        objective, rules, theta = search_space(settings, frozen.spec)
        encoder = Encoder(
            frozen.processor, settings.prompt, settings.answer, objective.visual_tokens, settings.max_tokens
        )
        data = load_data(settings, encoder)
        for line in data.summary():
            say(line)
        _check_unseen(settings, data)
        if resume:
            folder.check_data(data)
        elif accelerator.is_main_process:
            folder.create(settings, data)
        accelerator.wait_for_everyone()
        return _search(
            _Ready(settings, accelerator, folder, frozen, objective, rules, theta, data, encoder), say, pause
        )


def _check_unseen(settings: SearchSettings, data: Data) -> None:
    """Whether rows are left to choose counts by that no step has seen.

    Raises:
        SettingError: the steps take too many.
    """
    seen = settings.steps * settings.batch_size
    asked = math.ceil(settings.fit_rows / settings.batch_size) * settings.batch_size  # whole batches
    if asked and seen + asked > len(data.rows):
        problem = f"the steps see {seen} of {len(data.rows)} rows, and counts are chosen by others"
        raise SettingError("fit_rows", settings.fit_rows, problem, "give fewer steps, or more samples")


@dataclass(frozen=True)
class _Ready:
    settings: SearchSettings
    accelerator: Accelerator
    folder: RunFolder
    frozen: Frozen
    objective: Objective
    rules: Rules
    theta: Theta
    data: Data
    encoder: Encoder


def _search(ready: _Ready, say: Say, pause: int | None) -> SearchResult:
    settings, accelerator, folder = ready.settings, ready.accelerator, ready.folder
    theta = ready.theta
    trainer = Trainer(theta, ready.rules, ready.objective, settings, accelerator)
    first = folder.load(accelerator)
    task = _task(ready)
    started = {"first_step": first, "processes": accelerator.num_processes, **provenance(seed=settings.seed)}
    spent = SpentTime(earlier_seconds(folder.path) if first else 0.0)

    def note_spent() -> None:
        seconds = spent.seconds(accelerator)
        if accelerator.is_main_process:
            about = {"search": started, "device": str(accelerator.device), "cpu_seconds": seconds}
            write_json(folder.path / RUN, about)

    note_spent()
    folder.open(first)
    skipped, paused = 0, False
    loader = _loader(ready, first, settings.steps)
    try:
        with stop_signals() as asked, tqdm(total=settings.steps, initial=first, disable=needs_no_bar(say)) as bar:
            for step, batch in enumerate(loader, start=first):
                trainer.temper()
                values = theta().table.detach().T.tolist() if step % settings.log_every == 0 else None
                result = trainer.step(batch, task, stop=bool(asked))
                skipped += len(result.skipped)
                for row, problem in result.skipped:
                    say(f"step {step}: row {row} skipped: {problem}")
                folder.record(record_of(step, result, values))
                show(bar, step, settings.steps, result, say)
                done = step + 1
                ended = done == settings.steps
                paused = done == pause
                if result.stop or paused or ended or done % settings.checkpoint_every == 0:
                    folder.save(accelerator, done)
                    note_spent()
                if result.stop and not ended:
                    raise Interrupted(done)
                if paused:
                    break  # so that the data loader's processes end
    finally:
        folder.close()
    if skipped:
        say(f"{skipped} times a row was skipped because its image could not be decoded")
    if first < settings.steps:
        note_spent()  # the data loader's processes have ended, and count now
    if paused:
        raise Paused
    return _export(ready, task, note_spent, say)


def _export(ready: _Ready, task: ModelTask, note_spent: Callable[[], None], say: Say) -> SearchResult:
    folder, theta, settings = ready.folder, ready.theta, ready.settings
    records = read_records(folder.path)
    theta.gate_scale = theta.ranges.gate_scale
    if schedules := _fitted(ready, task, say):
        note_spent()
    origin = search_provenance(settings, ready.data, records)
    profile = searched_profile(theta, ready.rules, settings.name, origin, schedules)
    if ready.accelerator.is_main_process:
        write_json(folder.theta, profile.to_dict())
    return SearchResult(profile, folder.theta, records)


def _loader(ready: _Ready, first: int, stop: int) -> DataLoader[Any]:
    """This process's batches of steps ``first`` to ``stop - 1``."""
    settings, accelerator = ready.settings, ready.accelerator
    own = accelerator.process_index, accelerator.num_processes
    sampler = StepSampler(len(ready.data.rows), settings.batch_size, first, stop, settings.seed, *own)
    return DataLoader(
        EncodedRows(ready.data, ready.encoder),
        batch_sampler=sampler,
        num_workers=settings.workers,
        collate_fn=_as_it_is,
        worker_init_fn=leave_signals_to_the_main_process,
    )


def _fitted(ready: _Ready, task: ModelTask, say: Say) -> dict[str, Counts]:
    """Counts for each served budget, by the rows behind those of the last step."""
    settings, accelerator = ready.settings, ready.accelerator
    if not settings.fit_rows:
        return {}
    stop = settings.steps + math.ceil(settings.fit_rows / settings.batch_size)
    rows = [row for batch in _loader(ready, settings.steps, stop) for row in batch]
    answers = ready.objective.cross_entropy
    if answers:  # what is served are answers; states that deviate are a means to them, and not worth their pass here
        task = replace(task, objective=replace(task.objective, lambda_align=0.0, lambda_kl=0.0))

    def loss(row: Any, values: ThetaValues, structure: Structure) -> float:
        terms = task(row, values, structure)
        return (terms.cross_entropy if answers else terms.total).item()

    def add_up(sums: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(sums.to(accelerator.device), "sum").cpu()

    budgets = settings.fit_budgets or settings.serve_budgets
    say(f"choosing counts at {len(budgets)} budgets by {len(rows)} rows")
    return fit_schedules(ready.theta(), ready.rules, budgets, rows, loss, add_up)


def _task(ready: _Ready) -> ModelTask:
    settings = ready.settings
    relaxation = Relaxation(
        settings.boundary_sharpness,
        "gate" not in settings.frozen,
        settings.checkpointing,
        ready.frozen.flash_reference,
        keep_estimator(settings.keep_estimator, settings.boundary_sharpness, settings.keep_width, settings.keep_every),
        Differences(settings.keep_width, settings.keep_every),
        settings.gate_tries,
    )
    model = RelaxedModel(ready.frozen.model, ready.rules, relaxation)
    return ModelTask(model, ready.objective, ready.objective.visual_tokens, settings.cache_mib << 20)


def _as_it_is(batch: list[Any]) -> list[Any]:
    return batch
