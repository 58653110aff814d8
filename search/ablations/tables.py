"""Tables of a study from its raw result: accuracy, and paired differences to a base, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eos_search.ablations.variants import BASE
from eos_search.accuracy import AVERAGE, Share, difference
from eos_search.answerers import STOCK
from eos_search.scorers import scorer_of
from eos_vllm.cluttervqa import Row
from eos_vllm.core.errors import EosError


def result_rows(result: Mapping[str, Any]) -> list[Row]:
    """The questions of a raw result, as far as marking and the bootstrap need them."""
    return [
        Row(
            *(r["id"], r["kind"], "", r["answer"], (Path(r["image"]),), ()),
            answers=tuple(r.get("answers", ())),
            options=tuple(r.get("options", ())),
        )
        for r in result["rows"]
    ]


def differences_to(result: Mapping[str, Any], name: str) -> dict[tuple[str, int | None], dict[str, Share]]:
    """Accuracy of every case minus that of case ``name`` at the same budget, paired, by kind of question.

    Args:
        result: raw result.
        name: label or profile that is subtracted; where it has no budget (the unreduced model), it is so at every one.

    Returns:
        By label and budget; cases for which there is nothing to subtract are missing.
    """
    rows, scorer = result_rows(result), scorer_of(result)
    theirs = {case["budget"]: case["replies"] for case in result["cases"] if case["profile"] == name}
    found = {}
    for case in result["cases"]:
        against = theirs.get(case["budget"], theirs.get(None))
        if case["profile"] != name and against is not None:
            found[case["profile"], case["budget"]] = difference(rows, case["replies"], against, scorer=scorer)
    return found


def reading_depth(result: Mapping[str, Any], kind: str = AVERAGE) -> int:
    """The first layer behind which images may go for less than half of what they are worth.

    They are worth what all tokens have above chance, or where chance is not known, above the worst layer.

    Args:
        result: raw result of the study ``reading``.
        kind: kind of question.

    Returns:
        The layer; the last one of the model where all others lose more than half.

    Raises:
        EosError: images are worth nothing.
    """
    behind = {case["layer"]: case["accuracy"][kind]["value"] for case in result["cases"] if "layer" in case}
    whole = next(case["accuracy"][kind]["value"] for case in result["cases"] if case["profile"] == STOCK)
    nothing = result.get("chance", {}).get(kind, min(behind.values()))
    if whole <= nothing:
        problem = f"with all tokens {100 * whole:.1f} % are right, without any {100 * nothing:.1f} %"
        raise EosError("reading", result.get("model"), problem, "take a model that reads its images")
    enough = [layer for layer in sorted(behind) if behind[layer] - nothing > (whole - nothing) / 2]
    return enough[0] if enough else max(behind) + 1


def study_table(result: Mapping[str, Any], kind: str = AVERAGE, against: str = BASE) -> str:
    """A row for each variant: accuracy at each budget, and where ``against`` is a case, the points that it lacks to it.

    Args:
        result: raw result of a study.
        kind: kind of question.
        against: case whose paired difference to all others is shown, with its interval.
    """
    cases = {(case["profile"], case["budget"]): case for case in result["cases"]}
    budgets = sorted({budget for _, budget in cases if budget is not None}, reverse=True)
    apart = differences_to(result, against)
    heads = [head for budget in budgets for head in (str(budget), *([f"minus {against}"] if apart else []))]
    lines = [
        "| " + " | ".join([f"{kind}, {scorer_of(result).name}", *heads, "note"]) + " |",
        "| --- " * (len(heads) + 2) + "|",
    ]
    for name in dict.fromkeys(name for name, _ in cases):
        cells, note = [], ""
        for budget in budgets:
            case = cases.get((name, budget)) or cases.get((name, None))
            note = case.get("note", note) if case else note
            cells.append(str(Share(**case["accuracy"][kind])) if case else "")
            if apart:
                gap = apart.get((name, budget), {}).get(kind)
                cells.append(f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})" if gap else "")
        lines.append("| " + " | ".join(["all tokens" if name == STOCK else name, *cells, note]) + " |")
    failed = [f"No profile from {name}: {reason}" for name, reason in result.get("failed", {}).items()]
    return "\n".join(lines + (["", *failed] if failed else []))
