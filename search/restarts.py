"""A search from several starts: the same data and steps from each, and the end with the lowest loss is taken.

With a race only the best third of the starts goes on behind a step: three starts that race over half of the steps
take two thirds of the time.
"""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from eos_search.export import FINAL_STEPS, final_terms, write_json
from eos_search.frozen import model_spec
from eos_search.run import Paused, SearchResult, run_search
from eos_search.run_folder import RESTARTS, SETTINGS, THETA, RunFolder, read_records
from eos_search.settings import SearchSettings, read_settings
from eos_search.space import search_space
from eos_search.starts import Start, folder_of
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import read_profile

_NO_REDUCER = "gate_threshold"
_ONE_OF = 3


def run_restarts(
    settings: SearchSettings,
    starts: Sequence[Start],
    resume: bool = False,
    quiet: bool = False,
    race: int | None = None,
    search: Callable[..., SearchResult] = run_search,
) -> SearchResult:
    """Searches from each start, and writes the best profile to the output folder.

    Best is the lowest loss, penalties included, as a mean over the last steps: all searches see the same rows in the
    same order. The profile is that of its own search to the byte; ``restarts.json`` says how all of them ended. Where
    counts are fitted in the end (``fit_rows``), they are for the best alone, and the others have no profile.

    Args:
        settings: of every search, but for what starts change; each gets a folder in that of these.
        starts: changed settings of each.
        resume: go on with what was stopped; what has ended is not searched again.
        quiet: as :func:`eos_search.run.run_search`.
        race: steps behind which the third of the starts with the lowest loss goes on alone; None: all of them do.
        search: what runs one.

    Raises:
        SettingError: as :func:`eos_search.run.run_search`; a race as long as the search; or no search ended with a
            layer that reduces.
    """
    folder = RunFolder(settings.output, is_main=True)
    if resume:
        folder.check_new((SETTINGS,))  # a search from a single start
    else:
        folder.check_new()
    if race is not None and not 0 < race < settings.steps:
        remedy = f"give 1 to {settings.steps - 1}, or leave it out"
        raise SettingError("race", race, f"a search has {settings.steps} steps", remedy)
    ends: list[dict[str, Any]] = []
    results: dict[str, SearchResult] = {}
    every = [
        (name := folder_of(start), read_settings({**settings.to_dict(), **start, "output": settings.output / name}))
        for start in starts
    ]
    for _, own in every:
        if not resume:
            RunFolder(own.output, is_main=True).check_new()
        search_space(own, model_spec(own))  # refuses a start that cannot be before any has searched for hours
    _note_race(settings.output / RESTARTS, race, resume)
    raced = {} if race is None else {name: _raced(own, race, resume, quiet, search) for name, own in every}
    ahead = sorted(raced, key=lambda name: raced[name]["loss"])[: math.ceil(len(raced) / _ONE_OF)]
    for start, (name, own) in zip(starts, every, strict=True):
        end: dict[str, Any] = {field: getattr(own, field) for field in start} | {"folder": name}
        ends.append(end)
        if raced and name not in ahead:
            end |= {"steps": race, "left": raced[name]}
        elif settings.fit_rows:  # only the best will go beyond its last step
            end["final"] = _raced(own, own.steps, resume or bool(raced), quiet, search)
        elif (result := _ended(own, end, resume or bool(raced), quiet, search)) is not None:
            end["final"] = final_terms(result.records)
            results[name] = result
    settings_of, best = dict(every), None
    for end in sorted((end for end in ends if "final" in end), key=lambda end: end["final"]["loss"]):
        best = results.get(end["folder"]) or _ended(settings_of[end["folder"]], end, True, quiet, search)
        if best is not None:
            break
    about = {"race": race, "steps_averaged": FINAL_STEPS, "searches": ends}
    if PartialState().is_main_process:
        write_json(settings.output / RESTARTS, {"best": None if best is None else end["folder"], **about})
    if best is None:
        problem = "no search ended with a layer that reduces"
        raise SettingError("restarts", len(ends), problem, f"see {RESTARTS} for each, and raise lambda_budget")
    path = settings.output / THETA
    if PartialState().is_main_process:
        write_json(path, json.loads(best.path.read_text(encoding="utf-8")))
    return SearchResult(best.profile, path, best.records)


def _ended(
    settings: SearchSettings, end: dict[str, Any], resume: bool, quiet: bool, search: Callable[..., SearchResult]
) -> SearchResult | None:
    """A search that has ended, its layers noted in ``end``; None where none reduces, which is noted as well."""
    try:
        result = read_or_search(settings, resume, quiet, search)
    except EosError as error:
        if error.field != _NO_REDUCER:
            raise
        end["failed"] = str(error)
        return None
    end["layers"] = list(result.profile.layers)
    return result


def _note_race(file: Path, race: int | None, resume: bool) -> None:
    """Keeps the race, which is in no start's settings; refuses to go on with another one."""
    if resume and file.exists():
        before = json.loads(file.read_text(encoding="utf-8")).get("race")
        if before != race:
            problem = f"the searches in {file.parent} have {before}"
            raise SettingError("race", race, problem, "give the same one, or another output folder")
    elif PartialState().is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"race": race, "searches": []})


def _raced(
    settings: SearchSettings, race: int, resume: bool, quiet: bool, search: Callable[..., SearchResult]
) -> dict[str, Any]:
    """Terms of the last steps of a race."""
    folder = RunFolder(settings.output, is_main=True)
    begun = resume and (settings.output / SETTINGS).exists()
    if begun:
        folder.check_resumes(settings)
    if not begun or not (folder.theta.exists() or folder.reached >= race):
        with contextlib.suppress(Paused):
            search(settings, resume=begun, quiet=quiet, pause=race)
    return final_terms(read_records(settings.output)[:race])


def read_or_search(
    settings: SearchSettings, resume: bool, quiet: bool, search: Callable[..., SearchResult] = run_search
) -> SearchResult:
    """What a search found: read where it has ended, gone on with where it was stopped.

    Raises:
        EosError: as :func:`eos_search.run.run_search`; the folder holds a search of other settings.
    """
    output: Path = settings.output
    begun = resume and (output / SETTINGS).exists()
    if begun and (output / THETA).exists():
        RunFolder(output, is_main=True).check_resumes(settings)
        return SearchResult(read_profile(output / THETA), output / THETA, read_records(output))
    return search(settings, resume=begun, quiet=quiet)
