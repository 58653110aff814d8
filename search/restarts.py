"""A search from several starts: the same data and steps from each, and the end with the lowest loss is taken.

Starts differ in their placement, in the selector before the decoder, and in the layer that withdraws images: what no
gradient leads from one to the other.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from eos_search.export import FINAL_STEPS, final_terms, write_json
from eos_search.run import SearchResult, run_search
from eos_search.run_folder import SETTINGS, THETA, RunFolder, read_records
from eos_search.settings import SearchSettings, read_settings
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import read_profile

RESTARTS = "restarts.json"
# Settings that a start changes.
Start = dict[str, Any]
_NO_REDUCER = "gate_threshold"


def parse_placements(text: str) -> list[tuple[int, ...]]:
    """Placements such as ``0,1,3;2,3,5``.

    Raises:
        SettingError: what is no list of layers, fewer than two of them, or one twice.
    """
    try:
        found = [tuple(int(layer) for layer in part.split(",")) for part in text.split(";")]
    except ValueError:
        found = []
    if len(found) < 2 or len(set(found)) < len(found):
        raise SettingError("restarts", text, "these are no placements", "give two or more, such as '0,1,3;2,3,5'")
    return found


def starts_of(placements: str | None, selectors: str | None, withdrawals: str | None) -> list[Start]:
    """All combinations of what is given, each as changed settings.

    Args:
        placements: see :func:`parse_placements`; None: that of the settings.
        selectors: comma-separated names, ``none`` among them; None: that of the settings.
        withdrawals: comma-separated layers, ``none`` among them; None: that of the settings.

    Raises:
        SettingError: one of them is no list of two or more, each once.
    """
    choices: list[list[Start]] = [
        [{}] if placements is None else [{"placement": placement} for placement in parse_placements(placements)]
    ]
    for name, text in (("select", selectors), ("withdraw", withdrawals)):
        if text is None:
            continue
        parts = [part.strip() for part in text.split(",")]
        if len(parts) < 2 or len(set(parts)) < len(parts):
            example = "maxmin,none" if name == "select" else "5,6,none"
            raise SettingError(f"restarts_{name}", text, "these are no choices", f"give two or more, such as {example}")
        choices.append([{name: part} for part in parts])
    return [{name: value for start in parts for name, value in start.items()} for parts in itertools.product(*choices)]


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
        (name := _folder(start), read_settings({**settings.to_dict(), **start, "output": settings.output / name}))
        for start in starts
    ]
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


def _folder(start: Start) -> str:
    """``start-2-3-5-maxmin-withdraw-6`` and the like."""
    parts = ["-".join(map(str, start["placement"]))] if "placement" in start else []
    parts += [str(start["select"])] if "select" in start else []
    parts += [f"withdraw-{start['withdraw']}"] if "withdraw" in start else []
    return "-".join(["start", *parts])


def _search(settings: SearchSettings, resume: bool, quiet: bool, search: Callable[..., SearchResult]) -> SearchResult:
    output: Path = settings.output
    begun = resume and (output / SETTINGS).exists()
    if begun and (output / THETA).exists():
        RunFolder(output, is_main=True).check_resumes(settings)
        return SearchResult(read_profile(output / THETA), output / THETA, read_records(output))
    return search(settings, resume=begun, quiet=quiet)
