"""A search from several starts: the same data and steps from each, and the end with the lowest loss is taken."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from eos_search.export import FINAL_STEPS, final_terms, write_json
from eos_search.frozen import model_spec
from eos_search.run import SearchResult, run_search
from eos_search.run_folder import SETTINGS, THETA, RunFolder, read_records
from eos_search.settings import SearchSettings, read_settings
from eos_search.space import search_space
from eos_search.starts import Start, folder_of
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import read_profile

RESTARTS = "restarts.json"
_NO_REDUCER = "gate_threshold"


def run_restarts(
    settings: SearchSettings,
    starts: Sequence[Start],
    resume: bool = False,
    quiet: bool = False,
    search: Callable[..., SearchResult] = run_search,
) -> SearchResult:
    """Searches from each start, and writes the best profile to the output folder.

    Best is the lowest loss, penalties included, as a mean over the last steps: all searches see the same rows in the
    same order. The profile is that of its own search to the byte; ``restarts.json`` says how all of them ended.

    Args:
        settings: of every search, but for what starts change; each gets a folder in that of these.
        starts: changed settings of each.
        resume: go on with what was stopped; what has ended is not searched again.
        quiet: as :func:`eos_search.run.run_search`.
        search: what runs one.

    Raises:
        SettingError: as :func:`eos_search.run.run_search`; or no search ended with a layer that reduces.
    """
    RunFolder(settings.output, is_main=True).check_new()
    ends: list[dict[str, Any]] = []
    results: dict[str, SearchResult] = {}
    every = [
        (name := folder_of(start), read_settings({**settings.to_dict(), **start, "output": settings.output / name}))
        for start in starts
    ]
    for _, own in every:
        search_space(own, model_spec(own))  # refuses a start that cannot be before any has searched for hours
    for start, (name, own) in zip(starts, every, strict=True):
        end: dict[str, Any] = {field: getattr(own, field) for field in start} | {"folder": name}
        try:
            result = _search(own, resume, quiet, search)
        except EosError as error:
            if error.field != _NO_REDUCER:
                raise
            ends.append({**end, "failed": str(error)})
            continue
        terms = final_terms(result.records)
        ends.append({**end, "layers": list(result.profile.layers), "final": terms})
        results[name] = result
    if not results:
        problem = "no search ended with a layer that reduces"
        raise SettingError("restarts", len(ends), problem, f"see {RESTARTS} for each, and raise lambda_budget")
    best = min((end for end in ends if "final" in end), key=lambda end: end["final"]["loss"])["folder"]
    path = settings.output / THETA
    if PartialState().is_main_process:
        write_json(settings.output / RESTARTS, {"best": best, "steps_averaged": FINAL_STEPS, "searches": ends})
        write_json(path, json.loads(results[best].path.read_text(encoding="utf-8")))
    return SearchResult(results[best].profile, path, results[best].records)


def _search(settings: SearchSettings, resume: bool, quiet: bool, search: Callable[..., SearchResult]) -> SearchResult:
    output: Path = settings.output
    begun = resume and (output / SETTINGS).exists()
    if begun and (output / THETA).exists():
        RunFolder(output, is_main=True).check_resumes(settings)
        return SearchResult(read_profile(output / THETA), output / THETA, read_records(output))
    return search(settings, resume=begun, quiet=quiet)
