"""Evaluations: accuracy of profiles at budgets on rows of questions, as raw results with every reply kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from eos_search.accuracy import AVERAGE, Share, accuracy, loyalty
from eos_search.answerers import BLIND, STOCK, Answerer, Case
from eos_search.corners import CORNERS, at_corner
from eos_search.raw import digest
from eos_search.scorers import EXACT, Scorer, scorer_of
from eos_search.selection import BLOCK, EARLIER, IMAGE, ROUNDED, SELECTIONS, WINDOWS, asked_by_image, asked_within
from eos_vllm import profiles
from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import RetainBudget, kept_counts, layer_average, own_budget, plain
from eos_vllm.core.errors import EosError
from eos_vllm.core.plan import Planner

CHANGES = (*SELECTIONS, EARLIER, IMAGE, *WINDOWS, ROUNDED, *CORNERS)

# Visual tokens of an image, where any do to see whether a budget can be met.
_ANY = 1024


def cases(names: Sequence[str], budgets: Sequence[RetainBudget | None]) -> list[Case]:
    """Every named profile at every budget; ``none`` and ``blind`` once, since they reduce nothing.

    Args:
        names: paths or names of profiles, ``none`` for the unreduced model, ``blind`` for that with other images,
            ``random@PROFILE`` and ``oracle@PROFILE`` for those selections in place of the profile's own choice: they
            have its reducers and counts, and differ in the choice alone; ``prune@PROFILE``, ``merge@``, ``pool@`` and
            ``reweight@`` for the corners of the operator: they differ in that alone; ``earlier@PROFILE`` for tokens
            that another question about the image chose, ``image@`` for the image's own choice, ``turn@`` and
            ``prompt@`` for that window, ``rounded@`` for counts rounded to KV blocks (:mod:`eos_search.selection`).
        budgets: retain budgets per image; None for each profile's own.

    Raises:
        EosError: a selection, a profile or a budget that cannot be.
    """
    found: list[Case] = []
    for name in names:
        if name in (STOCK, BLIND):
            found.append(Case(name, None, None, blind=name == BLIND))
            continue
        change, _, source = name.rpartition("@")
        if change and change not in CHANGES:
            raise EosError("profiles", name, "changes nothing known", f"choose from {', '.join(CHANGES)} before the @")
        profile = profiles.resolve(source)
        plain = profile.name
        if change in SELECTIONS and profile.before is not None:
            problem = "its patches are chosen before the decoder, where no such yardstick stands"
            raise EosError("profiles", name, problem, "compare with the selectors random and uniform")
        if change in CORNERS:
            profile = at_corner(profile, change)
        elif change == IMAGE:
            profile = asked_by_image(profile)
        elif change in WINDOWS:
            profile = asked_within(profile, change)
        for budget in budgets:
            kept_counts(profile, budget, profile.model.visual_tokens or _ANY)
            label = f"{change}@{plain}" if change else plain
            if any(case.name == label and case.profile != profile for case in found):
                raise EosError("profiles", label, "is the name of two profiles", "give each its own")
            selection = change if change in (*SELECTIONS, EARLIER) else None
            changed = change if change and not selection else None
            case = Case(label, profile, budget, selection, changed=changed, block=BLOCK if change == ROUNDED else 1)
            if case not in found:
                found.append(case)
    return found


def evaluate(
    answerer: Answerer,
    rows: Sequence[Row],
    wanted: Sequence[Case],
    progress: Callable[[str], Callable[[int], Any]],
    done: Sequence[dict[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], Any] = len,
    scorer: Scorer = EXACT,
) -> list[dict[str, Any]]:
    """Answers all rows in every case.

    Args:
        answerer: who answers.
        rows: the questions.
        wanted: the cases.
        progress: called with a profile's name, gives what is told of its progress.
        done: records of an evaluation of the same rows and model; those of profiles that do the same are taken over
            instead of asking again.
        keep: called with all records so far after each profile, so that a stopped evaluation loses but the last one.
        scorer: marks the replies.

    Returns:
        One record per case: profile, budget, counts, replies, accuracy, and loyalty to the unreduced model's replies
        in the cases behind it.
    """
    known = {key(record): record["replies"] for record in done}
    # Two searches may find one profile: what it replies does not depend on its name.
    same: dict[tuple[Any, ...], Any] = {}
    records: list[dict[str, Any]] = []
    stock = None
    for name, group in groupby(wanted, key=lambda case: case.name):
        described = [(case, describe(case)) for case in group]
        for case, about in described:
            if (does := _does(case, about)) in same:
                known.setdefault(key(about), same[does])
        missing = [case for case, about in described if key(about) not in known]
        fresh = iter(answerer.answer(rows, missing, progress(name)) if missing else ())
        for case, about in described:
            replies = next(fresh) if case in missing else known[key(about)]
            stock = replies if name == STOCK else stock
            same[_does(case, about)] = replies
            records.append(about | {"replies": replies} | marks(rows, replies, stock, scorer))
        keep(records)
    return records


def _does(case: Case, about: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that a case's replies depend on."""
    return about["does"], about["budget"], case.selection, case.blind, case.changed, case.block


def marks(
    rows: Sequence[Row], replies: Sequence[str], stock: Sequence[str] | None, scorer: Scorer = EXACT
) -> dict[str, Any]:
    """Accuracy of replies, and loyalty to the unreduced model's where they are known, as plain data."""
    found = {"accuracy": accuracy(rows, replies, scorer=scorer)}
    if stock is not None:
        found["loyalty"] = loyalty(rows, replies, stock)
    return {name: {kind: asdict(share) for kind, share in shares.items()} for name, shares in found.items()}


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two records one case: name, budget, and what the profile does."""
    return record["profile"], record["budget"], record.get("does")


def describe(case: Case) -> dict[str, Any]:
    """Name, digest, budget, counts after each reducer and layer average of a case."""
    if case.profile is None:
        return {"profile": case.name, "does": None, "budget": None, "kept": [], "layer_average": None}
    head = {
        "profile": case.name,
        "does": digest(case.profile),
        "budget": plain(own_budget(case.profile) if case.budget is None else case.budget),
    }
    if case.profile.model.visual_tokens is None:  # each image has counts of its own
        return head | {"kept": [], "layer_average": None}
    counts = Planner(case.profile, block=case.block).counts(case.budget)
    return head | {"kept": list(counts), "layer_average": round(layer_average(case.profile, counts), 1)}


def table(result: dict[str, Any], kind: str = AVERAGE) -> str:
    """Accuracy in percent with its interval as a Markdown table: a row per profile, a column per budget.

    Its first cell names the scorer.
    """
    found = {(c["profile"], c["budget"]): Share(**c["accuracy"][kind]) for c in result["cases"]}
    budgets = sorted({budget for _, budget in found if budget is not None}, reverse=True)
    head = f"| {kind}, {scorer_of(result).name} | all | "
    lines = [head + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * (len(budgets) + 1)]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [str(found.get((name, budget), "")) for budget in (None, *budgets)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
