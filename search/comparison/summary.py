"""What a comparison comes to: accuracy by method and cost, with intervals over questions and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eos_search.ablations.tables import result_rows
from eos_search.accuracy import AVERAGE, RESAMPLES, Share, resampled_marks
from eos_search.comparison.searches import GRADIENT
from eos_search.discrimination import APART, WITHOUT
from eos_search.scorers import scorer_of
from eos_vllm.core.errors import EosError

_Drawn = tuple[np.ndarray, np.ndarray]


def by_method(result: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Share]]:
    """Accuracy of each method at each cost: kinds, the mean without counting, and the mean, over its seeds.

    The bootstrap draws images and seeds with replacement. Where not all seeds of a method can have a cost, it has none.
    """
    return {case: _shares(result, *drawn) for case, drawn in _drawn(result).items()}


def against_best(result: Mapping[str, Any], kind: str = AVERAGE) -> dict[int, tuple[str, Share]]:
    """By cost: the opponent with the highest mean of ``kind``, and by how much the gradient search is above it.

    Images are drawn for both alike, seeds apart.
    """
    return _against_best(result, _drawn(result), kind)


def _against_best(
    result: Mapping[str, Any], every: Mapping[tuple[str, int], _Drawn], kind: str
) -> dict[int, tuple[str, Share]]:
    shares = {case: _shares(result, *drawn) for case, drawn in every.items()}
    found = {}
    for cost in sorted({cost for _, cost in every}, reverse=True):
        others = {m: shares[m, c][kind].value for m, c in every if c == cost and m != GRADIENT}
        if not others or (GRADIENT, cost) not in every:
            continue
        best = max(others, key=lambda method: others[method])
        found[cost] = best, _above(result, every, best, cost)[kind]
    return found


def _above(
    result: Mapping[str, Any], every: Mapping[tuple[str, int], _Drawn], opponent: str, cost: int
) -> dict[str, Share]:
    """What the gradient search has above one opponent at one cost."""
    (ours, ours_drawn), (theirs, theirs_drawn) = every[GRADIENT, cost], every[opponent, cost]
    return _shares(result, ours - theirs, ours_drawn - theirs_drawn)


def with_rules(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with the profiles of an evaluation as further opponents, each a method of its own without seeds.

    Raises:
        EosError: it asked other questions, or another model, or has a profile of the comparison.
    """
    for name in ("weights", "fingerprint", "max_tokens", "scorer"):
        if result.get(name) != other.get(name):
            problem = f"the comparison has {result.get(name)!r}"
            raise EosError(name, other.get(name), problem, "evaluate on the same images, model and settings")
    added = [case for case in other["cases"] if case["budget"] is not None]
    runs = {case["profile"]: case["does"] for case in added}
    if both := [run["profile"] for run in result["runs"] if run["profile"] in runs]:
        raise EosError("profile", both[0], "the comparison has it", "leave it out of the evaluation")
    methods = [{"profile": name, "does": does, "method": name, "seed": 0} for name, does in runs.items()]
    return {**result, "cases": [*result["cases"], *added], "runs": [*result["runs"], *methods]}


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: a table for each mean and kind, a row per method; and the gradient search against each opponent, and
    against the best one at each cost."""
    every = _drawn(result)
    shares = {case: _shares(result, *drawn) for case, drawn in every.items()}
    costs = sorted({cost for _, cost in shares}, reverse=True)
    methods = list(dict.fromkeys(method for method, _ in shares))
    kinds = list(next(iter(shares.values())))
    parts = []
    for kind in [*kinds[-2:], *kinds[:-2]]:
        lines = [f"| {kind} | " + " | ".join(map(str, costs)) + " |", "| --- |" + " --- |" * len(costs)]
        for method in methods:
            cells = [str(shares[method, cost][kind]) if (method, cost) in shares else "-" for cost in costs]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if opponents := [method for method in methods if method != GRADIENT]:
        lines = ["| average: gradient minus | " + " | ".join(map(str, costs)) + " |", "| --- |" + " --- |" * len(costs)]
        for method in opponents:
            both = [{(GRADIENT, cost), (method, cost)} <= set(every) for cost in costs]
            above = [
                str(_above(result, every, method, cost)[AVERAGE]) if there else "-"
                for cost, there in zip(costs, both, strict=True)
            ]
            lines.append(f"| {method} | " + " | ".join(above) + " |")
        parts.append("\n".join(lines))
    lines = ["| gradient minus the best opponent | " + " | ".join(map(str, costs)) + " |"]
    lines.append("| --- |" + " --- |" * len(costs))
    for kind in kinds[-2:]:
        best = _against_best(result, every, kind)
        cells = [f"{best[cost][1]} {best[cost][0]}" if cost in best else "-" for cost in costs]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n\n".join([*parts, "\n".join(lines)])


def _drawn(result: Mapping[str, Any]) -> dict[tuple[str, int], _Drawn]:
    """By method and cost: mean of each kind over seeds, and the same of each resample ``[RESAMPLES, kinds]``."""
    rows, scorer = result_rows(result), scorer_of(result)
    runs = {(run["profile"], run["does"]): run for run in result["runs"]}
    seeds = {run["method"]: sum(other["method"] == run["method"] for other in runs.values()) for run in runs.values()}
    cases: dict[tuple[str, int], list[_Drawn]] = {}
    for case in result["cases"]:
        if (run := runs.get((case["profile"], case["does"]))) is not None:
            # The same seed of the bootstrap: the same images for all.
            values, drawn = resampled_marks(rows, case["replies"], scorer)
            cases.setdefault((run["method"], case["budget"]), []).append((values, drawn))
    found = {}
    for number, ((method, cost), each) in enumerate(cases.items()):
        if len(each) != seeds[method]:
            continue
        draws = np.random.default_rng((1, number)).integers(len(each), size=(RESAMPLES, len(each)))
        stacked = np.stack([drawn for _, drawn in each], axis=1)
        picked = np.take_along_axis(stacked, draws[:, :, None], axis=1).mean(axis=1)
        found[method, cost] = np.mean([values for values, _ in each], axis=0), picked
    return found


def _shares(result: Mapping[str, Any], values: np.ndarray, drawn: np.ndarray) -> dict[str, Share]:
    rows = result_rows(result)
    kinds = sorted({row.kind for row in rows})
    columns: dict[str, Sequence[int]] = {kind: [k] for k, kind in enumerate(kinds)}
    columns[WITHOUT] = [k for k, kind in enumerate(kinds) if kind != APART] or range(len(kinds))
    columns[AVERAGE] = range(len(kinds))
    found = {}
    for name, which in columns.items():
        # A resample of few images may lack a kind.
        each = drawn[:, which[0]] if len(which) == 1 else np.nanmean(drawn[:, which], axis=1)
        low, high = np.nanpercentile(each, (2.5, 97.5))
        asked = sum(row.kind in {kinds[k] for k in which} for row in rows)
        found[name] = Share(float(np.mean(values[which])), float(low), float(high), asked)
    return found
