"""The searched profile, ``theta.json``: what the last point Theta means, with where it came from.

Nothing in it depends on when, where or in how many sittings the search ran: the same settings, code and data give the
same bytes. What does depend on it stands in ``run.json`` beside it.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eos_search.data import Data
from eos_search.settings import NOT_RESULT, SearchSettings
from eos_search.structure import Rules, read_structure
from eos_search.theta import Theta
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile, Withdrawal, parse_profile
from eos_vllm.provenance import provenance

# Single batches are noisy; the final terms are means over so many last steps.
FINAL_STEPS = 50


def searched_profile(
    theta: Theta,
    rules: Rules,
    name: str,
    provenance: dict[str, Any],
    schedules: Mapping[str, Sequence[int]] | None = None,
) -> Profile:
    """The profile of a point Theta: layers that act become reducers, with the counts of Eq. 11 as its schedule.

    Its budget is what Eq. 11 leaves behind the last reducer; other budgets follow by the profile's rule (paper 2.6),
    but for those that ``schedules`` gives counts for.

    Raises:
        SettingError: no gate is above the threshold.
    """
    values = theta()
    structure = read_structure(values, rules)
    profile = structure.profile
    if profile is None or not structure.acting:
        highest = max(values.gate.tolist()[: values.depth - 1])
        problem = f"the highest gate is {highest:.3f}: no layer reduces, and there is nothing to serve"
        remedy = "raise lambda_budget, lower lambda_align, or lower the threshold"
        raise SettingError("gate_threshold", rules.gate_threshold, problem, remedy)
    data = profile.to_dict()
    every = data["schedules"] | {budget: list(counts) for budget, counts in (schedules or {}).items()}
    return parse_profile({**data, "schedules": every, "name": name, "provenance": provenance})


def reducer_lines(profile: Profile) -> list[str]:
    """What a searched profile does, a line per reducer, with the counts of its own budget."""
    counts = profile.schedules[str(profile.budget.tokens)]
    lines = []
    for reducer, count in zip(profile.reducers, counts, strict=True):
        if isinstance(reducer, Withdrawal):
            lines.append(f"layer {reducer.layer:<3} withdraws what is left")
            continue
        line = (
            f"layer {reducer.layer:<3} keeps {count:<4} gate {reducer.gate:.3f}  discard {reducer.discard:.3f}  "
            f"gamma {reducer.gamma:.3f}  tau {reducer.tau:.3f}  theta {reducer.theta:+.3f}  rho {reducer.rho:.3f}  "
            f"nu {reducer.nu:.3f}"
        )
        chosen = profile.selector if reducer is profile.before else None
        lines.append(line if chosen is None else f"{line}  chosen by {chosen.rule}")
    return lines


def search_provenance(settings: SearchSettings, data: Data, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Command, revision, versions, data, seed, settings and the final terms."""
    run = provenance()
    return {
        "command": command_line(settings),
        "git": run["git"],
        "versions": run["versions"],
        "seed": settings.seed,
        "data": data.to_dict(),
        "settings": portable(settings),
        "final": final_terms(records),
    }


def final_terms(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the terms over the last steps."""
    last = records[-FINAL_STEPS:]
    names = last[-1]["terms"] if last else {}
    means = {name: sum(record["terms"][name] for record in last) / len(last) for name in names}
    return {"steps_averaged": len(last), **means}


def portable(settings: SearchSettings) -> dict[str, Any]:
    """The settings that may change the result, without folders of the machine."""
    shown = {name: value for name, value in settings.to_dict().items() if name not in NOT_RESULT}
    return shown | {name: _portable(shown[name]) for name in ("model", "data")}


def command_line(settings: SearchSettings) -> str:
    """The command that does the same search: all settings that are not at their defaults."""
    fields = type(settings).model_fields
    words = ["eos-search", "run", "--output", f"runs/{settings.name}"]
    for name, value in portable(settings).items():
        default = None if fields[name].is_required() else fields[name].default
        if value not in (default, list(default) if isinstance(default, tuple) else default):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text.lower() if isinstance(value, bool) else text]
    return shlex.join(words)


def _portable(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def write_json(path: Path, document: Any) -> None:
    """Writes plain data, all or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
