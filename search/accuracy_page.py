"""The page of an evaluation, ``docs/results.md``: every figure on it comes from the raw result."""

from pathlib import Path
from typing import Any

from eos_search.ablations.tables import result_rows
from eos_search.accuracy import AVERAGE, difference
from eos_search.answerers import STOCK
from eos_search.evaluation import table
from eos_search.scorers import scorer_of
from eos_vllm.provenance import commit_line, machine_line

_HEAD = """\
# Accuracy against the retain budget

What visual token reduction costs on the model `{model}`, by kind of question. Drawn by

```
eos-search evaluate --table {raw}{against} \\
    --page {page} --figure {folder}{figure}
```

from the raw result, which keeps every reply; `make accuracy` measures what it lacks. {questions} questions on {images}
images of {source}, greedy, {through}; {unit} by scorer `{scorer}` with 95 %
intervals by bootstrap over images (kinds weigh alike in the average). Measured at commit {commit} on
{machine}.

A budget is what is left of an image's tokens after the last reducer. `prune@P`, `merge@P`, `pool@P` and `reweight@P`
have the layers, counts and choice of tokens of profile P, and that corner of the operator in place of its own
(reweighting scales K kept tokens by 1 + 1/K on average, which changes few replies, or none).
`random@P` and `oracle@P` are yardsticks: P itself, with patches chosen by lot, or with the objects' patches first;
the oracle doesn't know the question. What a profile does is told by `eos-vllm profile show NAME`. Profiles with other
layers may carry more tokens through the early ones at the same budget: see the layer average at the end of this page.

![accuracy against budget]({figure})
"""


def accuracy_page(result: dict[str, Any], raw: str, file: Path, figure: str, against: str | None = None) -> str:
    """The page as Markdown.

    Args:
        result: raw result of ``eos-search evaluate``.
        raw: path of its file, as the page names it.
        file: the page's own path.
        figure: file name of the figure beside the page.
        against: profile whose paired differences to all others the page shows.
    """
    source, scorer = result["provenance"], scorer_of(result)
    page = _HEAD.format(
        model=result["model"],
        raw=raw,
        page=file,
        folder="" if str(file.parent) == "." else f"{file.parent}/",
        figure=figure,
        against=f" --against {against}" if against else "",
        questions=len(result["rows"]),
        images=len({row["image"] for row in result["rows"]}),
        source=result["benchmark"]["source"],
        through={"reference": "the Hugging Face reference in float32", "server": "a running server"}[result["through"]],
        unit="mean score in percent" if scorer.graded else "percent of right answers",
        scorer=scorer.name,
        commit=commit_line(source),
        machine=machine_line(source),
    )
    if against:
        page += f"\n## {against} minus the others\n\nPoints on average over kinds, paired by question.\n\n"
        page += margins_table(result, against) + "\n"
    kinds = [AVERAGE, *(kind for kind in result["cases"][0]["accuracy"] if kind != AVERAGE)]
    for kind in kinds:
        page += f"\n## {kind.capitalize()}\n\n{table(result, kind)}\n"
        if kind in result["chance"]:
            page += f"\nChance is {100 * result['chance'][kind]:.1f}.\n"
    return page + "\n## Tokens kept\n\n" + counts_table(result) + "\n"


def margins_table(result: dict[str, Any], against: str) -> str:
    """Accuracy of ``against`` minus that of every other case at the same budget, in points, with 95 % intervals.

    The unreduced model stands against every budget.
    """
    rows, scorer = result_rows(result), scorer_of(result)
    replies = {(case["profile"], case["budget"]): case["replies"] for case in result["cases"]}
    budgets = sorted({budget for name, budget in replies if name == against}, reverse=True)
    lines = [f"| minus, {scorer.name} | " + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * len(budgets)]
    for name in dict.fromkeys(name for name, _ in replies if name != against):
        cells = []
        for budget in budgets:
            theirs = replies.get((name, budget), replies.get((name, None)))
            ours = replies[against, budget]
            cells.append(str(difference(rows, ours, theirs, scorer=scorer)[AVERAGE]) if theirs else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counts_table(result: dict[str, Any]) -> str:
    """Counts after each reducer and the layer average of every case, as a Markdown table."""
    lines = ["| profile | budget | kept after each reducer | layer average |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {c['profile']} | {c['budget']} | {', '.join(map(str, c['kept']))} | {c['layer_average']} |"
        for c in result["cases"]
        if c["profile"] != STOCK and c["kept"]
    ]
    return "\n".join(lines)
