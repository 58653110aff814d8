"""Evaluations: accuracy of profiles at budgets on rows of questions, as raw results with every reply kept."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from eos_search.accuracy import AVERAGE, Share, accuracy, loyalty
from eos_search.answerers import BLIND, STOCK, Answerer, Case
from eos_search.selection import SELECTIONS
from eos_vllm import profiles
from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import kept_counts, layer_average
from eos_vllm.core.errors import EosError


def cases(names: Sequence[str], budgets: Sequence[int | None]) -> list[Case]:
    """Every named profile at every budget; ``none`` and ``blind`` once, since they reduce nothing.

    Args:
        names: paths or names of profiles, ``none`` for the unreduced model, ``blind`` for that with other images,
            ``random@PROFILE`` and ``oracle@PROFILE`` for those selections in place of the profile's own choice: they
            have its reducers and counts, and differ in the choice alone.
        budgets: retain budgets per image; None for each profile's own.

    Raises:
        EosError: a selection, a profile or a budget that cannot be.
    """
    found: list[Case] = []
    for name in names:
        if name in (STOCK, BLIND):
            found.append(Case(name, None, None, blind=name == BLIND))
            continue
        selection, _, source = name.rpartition("@")
        if selection and selection not in SELECTIONS:
            raise EosError("profiles", name, "names no selection", f"choose {' or '.join(SELECTIONS)} before the @")
        profile = profiles.resolve(source)
        for budget in budgets:
            kept_counts(profile, budget)
            label = f"{selection}@{profile.name}" if selection else profile.name
            found.append(Case(label, profile, budget, selection or None))
    return found


def evaluate(
    answerer: Answerer,
    rows: Sequence[Row],
    wanted: Sequence[Case],
    progress: Callable[[str], Callable[[int], Any]],
    done: Sequence[dict[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], Any] = len,
) -> list[dict[str, Any]]:
    """Answers all rows in every case.

    Args:
        answerer: who answers.
        rows: the questions.
        wanted: the cases.
        progress: called with a profile's name, gives what is told of its progress.
        done: records of an evaluation of the same rows that are taken over instead of asking again.
        keep: called with all records so far after each profile, so that a stopped evaluation loses nothing.

    Returns:
        One record per case: profile, budget, counts, replies, accuracy, and loyalty to the unreduced model's replies
        in the cases behind it.
    """
    known = {(record["profile"], record["budget"]): record["replies"] for record in done}
    records: list[dict[str, Any]] = []
    stock = None
    for name, group in groupby(wanted, key=lambda case: case.name):
        described = [(case, describe(case)) for case in group]
        missing = [case for case, about in described if (name, about["budget"]) not in known]
        fresh = iter(answerer.answer(rows, missing, progress(name)) if missing else ())
        for case, about in described:
            replies = next(fresh) if case in missing else known[name, about["budget"]]
            stock = replies if name == STOCK else stock
            records.append(about | {"replies": replies} | marks(rows, replies, stock))
        keep(records)
    return records


def marks(rows: Sequence[Row], replies: Sequence[str], stock: Sequence[str] | None) -> dict[str, Any]:
    """Accuracy of replies, and loyalty to the unreduced model's where they are known, as plain data."""
    found = {"accuracy": accuracy(rows, replies)}
    if stock is not None:
        found["loyalty"] = loyalty(rows, replies, stock)
    return {name: {kind: asdict(share) for kind, share in shares.items()} for name, shares in found.items()}


def describe(case: Case) -> dict[str, Any]:
    """Name, budget, counts after each reducer and layer average of a case."""
    if case.profile is None:
        return {"profile": case.name, "budget": None, "kept": [], "layer_average": None}
    counts = kept_counts(case.profile, case.budget)
    return {
        "profile": case.name,
        "budget": case.profile.budget.tokens if case.budget is None else case.budget,
        "kept": list(counts),
        "layer_average": round(layer_average(case.profile, counts), 1),
    }


def read_result(file: str | Path) -> dict[str, Any]:
    """A raw result of an evaluation.

    Raises:
        EosError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EosError(
            "result", str(file), f"cannot be read ({error})", "name a file of eos-search evaluate"
        ) from error
    if not isinstance(result, dict) or "cases" not in result:
        raise EosError("result", str(file), "is no evaluation", "name a file of eos-search evaluate --out")
    return result


def table(result: dict[str, Any], kind: str = AVERAGE) -> str:
    """Accuracy in percent with its interval as a Markdown table: a row per profile, a column per budget."""
    found = {(c["profile"], c["budget"]): Share(**c["accuracy"][kind]) for c in result["cases"]}
    budgets = sorted({budget for _, budget in found if budget is not None}, reverse=True)
    lines = [f"| {kind} | all | " + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * (len(budgets) + 1)]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [str(found.get((name, budget), "")) for budget in (None, *budgets)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
