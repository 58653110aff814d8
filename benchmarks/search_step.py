"""What a row costs a search: operations that are dispatched, and seconds, by how gates and counts get their gradients.

    python -m benchmarks.search_step --out results/search-step-cpu.json

A LLaVA of 32 narrow layers and 576 visual tokens with random weights: how many operations there are does not depend on
widths, and on a GPU a search of short rows is bound by launching them. Views are left out, which launch nothing. Cases
take turns.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from eos_search.estimators.base import KeepName
from eos_search.estimators.choice import keep_estimator
from eos_search.examples import Encoder, Prepared, prepare
from eos_search.frozen import load_frozen
from eos_search.objective import Objective, reference_rows
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.settings import read_settings
from eos_search.space import search_space
from eos_search.structure import Rules, read_structure
from eos_search.task import example_terms
from eos_search.theta import Theta, ThetaValues
from eos_vllm.models.tiny import EMBEDDED
from loadtests.origin import origin

LAYERS = 32
_VIEWS = (
    "view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "as_strided", "t",
    "detach", "alias", "unbind", "split", "narrow", "diagonal", "_unsafe_view", "chunk", "lift_fresh", "resolve_conj",
    "resolve_neg", "item", "_local_scalar_dense", "is_nonzero", "empty", "empty_strided", "empty_like",
    "split_with_sizes",
)  # fmt: skip
# Name, estimator of counts, closed gates that are tried for a row (0: all).
CASES: tuple[tuple[str, KeepName, int], ...] = (
    ("Eq. 12, all gates", "eq12", 0),
    ("Eq. 12, 4 gates in turn", "eq12", 4),
    ("ghosts, 4 gates in turn", "ghosts", 4),
    ("differences, 4 gates in turn", "differences", 4),
)


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of all cases (default: %(default)s)")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The raw result."""
    torch.set_num_threads(1)
    with common.random_model(replace(EMBEDDED, num_decoder_layers=LAYERS)) as path:
        settings = read_settings({"model": str(path), "output": "unused", "data_format": "cluttervqa", "samples": 1})
        frozen = load_frozen(settings, torch.device("cpu"))
        objective, rules, theta = search_space(settings, frozen.spec)
        example = _example(frozen, settings, objective, rules)
        rows = {name: Row(frozen.model, objective, rules, theta, example, keep, few) for name, keep, few in CASES}
        operations = {name: row.operations() for name, row in rows.items()}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for turn, name, counts in common.turns(tuple(rows), args.rounds):
            began = time.perf_counter()
            rows[name].run(turn)
            if counts:
                seconds[name].append(time.perf_counter() - began)
    about = {"layers": LAYERS, "visual_tokens": objective.visual_tokens, "rows": len(example.embeddings)}
    return {"provenance": origin(seed=0), "settings": about, "operations": operations, "seconds": seconds}


class Row:
    """A row of the data, whose gradients are taken in one way."""

    def __init__(
        self, model: Any, objective: Objective, rules: Rules, theta: Theta, example: Prepared, keep: KeepName, few: int
    ) -> None:
        self.model = RelaxedModel(model, rules, Relaxation(keep=keep_estimator(keep), tries=few))
        self.objective, self.theta, self.example = objective, theta, example
        states = self.model.reference(example, objective.aligned)
        self.reference = reference_rows(objective, example, states)

    def run(self, number: int) -> None:
        """Loss and gradients; the unreduced pass is one that is remembered."""
        values = ThetaValues(self.theta().table.detach().requires_grad_())
        structure = read_structure(values, self.model.rules)
        terms = example_terms(self.model, self.objective, self.example, values, structure, self.reference, number)
        terms.total.backward()

    def operations(self) -> int:
        """Those that would launch something."""
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.run(0)
        leaves = [event for event in seen.events() if event.name.startswith("aten::") and not event.cpu_children]
        return sum(event.name.removeprefix("aten::") not in _VIEWS for event in leaves)


def _example(frozen: Any, settings: Any, objective: Objective, rules: Rules) -> Prepared:
    from eos_search.data import load_data

    encoder = Encoder(frozen.processor, settings.prompt, settings.answer, objective.visual_tokens, settings.max_tokens)
    encoded = encoder.encode(0, load_data(settings, encoder).rows[0])
    return prepare(frozen.model, encoded, rules.importance.queries, objective.visual_tokens)  # type: ignore[arg-type]


def table(result: dict[str, Any]) -> str:
    """Operations and median milliseconds by case."""
    lines = ["| case | operations | ms | over the first |", "| --- | --- | --- | --- |"]
    first = result["seconds"][CASES[0][0]]
    for name, count in result["operations"].items():
        seconds = result["seconds"][name]
        ratio = common.shown(*common.ratio(seconds, first).values(), 2)
        lines.append(f"| {name} | {count} | {1000 * statistics.median(seconds):.0f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
