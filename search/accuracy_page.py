"""The page of an evaluation, ``docs/accuracy.md``: every figure on it comes from the raw result."""

from typing import Any

from eos_search.accuracy import AVERAGE
from eos_search.answerers import STOCK
from eos_search.evaluation import table
from eos_vllm.provenance import commit_line, machine_line

_HEAD = """\
# Accuracy against the retain budget

What visual token reduction costs on the model `{model}`, by kind of question. Drawn by

```
eos-search evaluate --table {raw} --page docs/accuracy.md --figure docs/{figure}
```

from the raw result `{raw}`, which keeps every reply; `make accuracy` measures what it lacks. {questions} questions
about {images} images of {source}, greedy, {through}; percent of right answers with 95 % intervals by bootstrap
over images (kinds weigh alike in the average). Measured at commit {commit} on {machine}.

A budget is what is left of an image's tokens after the last reducer. `random@P` and `oracle@P` are yardsticks: the
reducers and counts of profile P, with patches chosen by lot, or with the objects' patches first; the oracle doesn't
know the question. What a profile does is told by `eos-vllm profile show NAME`.

![accuracy against budget]({figure})
"""


def accuracy_page(result: dict[str, Any], raw: str, figure: str) -> str:
    """The page as Markdown.

    Args:
        result: raw result of ``eos-search evaluate``.
        raw: path of its file, as the page names it.
        figure: file name of the figure beside the page.
    """
    source = result["provenance"]
    page = _HEAD.format(
        model=result["model"],
        raw=raw,
        figure=figure,
        questions=len(result["rows"]),
        images=len({row["image"] for row in result["rows"]}),
        source=result["benchmark"]["source"],
        through={"reference": "the Hugging Face reference in float32", "server": "a running server"}[result["through"]],
        commit=commit_line(source),
        machine=machine_line(source),
    )
    kinds = [AVERAGE, *(kind for kind in result["cases"][0]["accuracy"] if kind != AVERAGE)]
    for kind in kinds:
        page += f"\n## {kind.capitalize()}\n\n{table(result, kind)}\n"
        if kind in result["chance"]:
            page += f"\nChance is {100 * result['chance'][kind]:.1f}.\n"
    return page + "\n## Tokens kept\n\n" + counts_table(result) + "\n"


def counts_table(result: dict[str, Any]) -> str:
    """Counts after each reducer and the layer average of every case, as a Markdown table."""
    lines = ["| profile | budget | kept after each reducer | layer average |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {c['profile']} | {c['budget']} | {', '.join(map(str, c['kept']))} | {c['layer_average']} |"
        for c in result["cases"]
        if c["profile"] != STOCK and c["kept"]
    ]
    return "\n".join(lines)
