"""Tables of the public benchmarks from the raw result of ``eos-search lmms``, as the paper's Tables 4, 7 and 8."""

from collections.abc import Mapping, Sequence
from typing import Any

from eos_search.lmms import TASKS

AVERAGE = "average"
# The paper's tables: budgets of Tables 4 and 7, benchmarks of Table 8.
TABLE_4, TABLE_7 = (192, 128, 64, 16), (32, 16)
TABLE_8 = ("pope", "mme", "mmbench_en_dev_static")
_NORMAL_95 = 1.96


def average(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """The tables' overall average: percent of full marks, all benchmarks alike (MME's 2800 count as 100)."""
    return sum(100 * score["value"] / TASKS[task].full for task, score in scores.items()) / len(scores)


def budget_tables(result: Mapping[str, Any], against: str | None = None) -> str:
    """A Markdown table per budget as the paper's Tables 4 and 7: a row per profile, a column per benchmark.

    Args:
        result: raw result of ``eos-search lmms``.
        against: profile; every other row gets one more with its difference to this one.
    """
    tasks = [task for task in TASKS if any(task in case["scores"] for case in result["cases"])]
    head = " | ".join(["profile", *(TASKS[task].title for task in tasks), AVERAGE])
    tables = []
    for budget in sorted({case["budget"] for case in result["cases"]}, key=lambda b: (b is not None, -(b or 0))):
        cases = [case for case in result["cases"] if case["budget"] == budget]
        base = next((case["scores"] for case in cases if case["profile"] == against), None)
        title = "All visual tokens" if budget is None else f"Retain = {budget} visual tokens"
        lines = [f"{title}\n", f"| {head} |", "| --- " * (len(tasks) + 2) + "|"]
        for case in cases:
            scores = case["scores"]
            lines.append(_row(case["profile"], scores, tasks, average(scores)))
            if base is not None and case["profile"] != against and base.keys() == scores.keys():
                gaps = {task: {"value": scores[task]["value"] - base[task]["value"]} for task in scores}
                lines.append(_row(f"minus {against}", gaps, tasks, average(gaps), "+"))
        lines += [_warning(case) for case in cases if case.get("failed")]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def cross_budget_table(result: Mapping[str, Any], task: str) -> str:
    """One benchmark over all budgets as the paper's Table 8, with 95 % intervals where there are standard errors."""
    found = {(c["profile"], c["budget"]): c["scores"][task] for c in result["cases"] if task in c["scores"]}
    budgets = sorted({budget for _, budget in found}, key=lambda b: (b is not None, -(b or 0)))
    heads = ["all" if budget is None else str(budget) for budget in budgets]
    lines = [f"| {TASKS[task].title} | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [_with_interval(task, found.get((name, budget))) for budget in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paper_tables(result: Mapping[str, Any], against: str) -> str:
    """The paper's Tables 4, 7 and 8 as Markdown, and what each row keeps; budgets that were not run are left out.

    Args:
        result: raw result of ``eos-search lmms``.
        against: profile whose difference to the others Table 7 shows.
    """

    def at(*budgets: int | None) -> dict[str, Any]:
        return {"cases": [case for case in result["cases"] if case["budget"] in budgets]}

    tasks = [task for task in TASKS if any(task in case["scores"] for case in result["cases"])]
    chosen = [task for task in tasks if task in TABLE_8] or tasks[: len(TABLE_8)]
    return "\n\n".join(
        [
            "## Table 4: main results",
            budget_tables(at(None, *TABLE_4)),
            f"## Table 7: aggressive budgets, differences to {against}",
            budget_tables(at(*TABLE_7), against),
            "## Table 8: one benchmark over all budgets",
            *(cross_budget_table(result, task) for task in chosen),
            "## Visual tokens kept",
            kept_table(result),
        ]
    )


def kept_table(result: Mapping[str, Any]) -> str:
    """What each row of a raw result keeps of an image: rows of one budget need not cost the same.

    Counts are the profile's, behind each reducer; ``counted`` is what the server counted per image.
    """
    lines = ["| profile | budget | kept after each reducer | counted | layer average |", "| --- " * 5 + "|"]
    for case in result["cases"]:
        if expected := case.get("expected"):
            counted = ", ".join(f"{count:.1f}" for count in case.get("kept_per_image", {}).values())
            kept = ", ".join(map(str, expected))
            lines.append(f"| {case['profile']} | {case['budget']} | {kept} | {counted} | {case['layer_average']} |")
    return "\n".join(lines)


def _row(name: str, scores: Mapping[str, Any], tasks: Sequence[str], mean: float, sign: str = "") -> str:
    cells = [f"{scores[t]['value']:{sign}.{TASKS[t].places}f}" if t in scores else "" for t in tasks]
    return f"| {name} | " + " | ".join([*cells, f"{mean:{sign}.2f}"]) + " |"


def _with_interval(task: str, score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    places, value = TASKS[task].places, score["value"]
    if score["error"] is None:
        return f"{value:.{places}f}"
    low, high = value - _NORMAL_95 * score["error"], value + _NORMAL_95 * score["error"]
    return f"{value:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def _warning(case: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{task} {count}" for task, count in case["failed"].items())
    return f"\n{case['profile']}: requests without an answer, marked as wrong: {counts}."
