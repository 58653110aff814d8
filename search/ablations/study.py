"""A study: variants at budgets over one evaluation, as one raw result that resumes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_search.ablations.variants import Variant
from eos_search.answerers import STOCK, Answerer, Case
from eos_search.evaluation import evaluate, key
from eos_search.raw import behaviour, digest, fingerprint, plain, read_earlier, write_raw
from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

_SAME = ("study", "base", "fingerprint", "model", "weights", "max_tokens")


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        name: of the study, as the command calls it.
        variants: in the order of the tables.
        base: the profile that the variants come from; None where they have none in common.
        failed: variants that came to nothing, with the reason.
    """

    name: str
    variants: tuple[Variant, ...]
    base: Profile | None = None
    failed: Mapping[str, str] | None = None


def study_cases(study: Study, budgets: Sequence[int | None]) -> list[Case]:
    """The unreduced model, then every variant at every budget.

    Args:
        study: the variants.
        budgets: retain budgets per image; None for each variant's own.

    Raises:
        BudgetError: a budget that a variant cannot have.
        EosError: two variants of one label.
    """
    labels = [variant.label for variant in study.variants]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise EosError("variants", sorted(twice)[0], "stands for two variants", "give each its own name")
    found = [Case(STOCK, None, None)]
    for variant in study.variants:
        for budget in budgets:
            kept_counts(variant.profile, budget)
            found.append(Case(variant.label, variant.profile, budget))
    return found


def run_study(
    study: Study,
    budgets: Sequence[int | None],
    rows: Sequence[Row],
    answerer: Answerer,
    header: Mapping[str, Any],
    out: Path | None,
    progress: Callable[[str], Callable[[int], Any]],
) -> dict[str, Any]:
    """Evaluates a study.

    Args:
        study: what is compared.
        budgets: as :func:`study_cases`.
        rows: the questions.
        answerer: who answers.
        header: what else stands in the result: ``model``, ``weights``, ``max_tokens``, provenance, benchmark.
        out: file of the raw result. What it holds already is not asked again, provided that the variant is the same.
        progress: called with a label, gives what is told of its progress.

    Returns:
        A raw result as that of ``eos-search evaluate``, with ``study`` and ``base``; each case also holds what its
        variant changed.

    Raises:
        EosError: ``out`` holds another study.
        BudgetError: a budget that a variant cannot have.
    """
    wanted = study_cases(study, budgets)
    about = {variant.label: variant.about for variant in study.variants}
    does = {(variant.label, digest(variant.profile)) for variant in study.variants} | {(STOCK, None)}
    result: dict[str, Any] = {
        **header,
        "study": study.name,
        "base": study.base and behaviour(study.base),
        "failed": dict(study.failed or {}),
        "through": "reference",
        "fingerprint": fingerprint(rows),
        "rows": [plain(row) for row in rows],
        "cases": [],
    }
    # A variant that does something else than before is asked again; others that are not asked for are kept.
    names = {name for name, _ in does}
    earlier = read_earlier(out, result, _SAME)
    done = [case for case in earlier if case["profile"] not in names or (case["profile"], case.get("does")) in does]

    def keep(records: list[dict[str, Any]]) -> None:
        fresh = [{**record, **about.get(record["profile"], {})} for record in records]
        seen = {key(record) for record in fresh}
        # What is not asked for this time, or not reached yet, is not lost.
        old = [case for case in done if key(case) not in seen]
        result["cases"] = fresh + old
        if out is not None:
            write_raw(out, result)

    evaluate(answerer, rows, wanted, progress, done, keep)
    return result
