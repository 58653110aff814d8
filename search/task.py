"""The task loss of a row of the data: encoded in a loader's process, embedded and run on the model's device."""

from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import Dataset

from eos_search.data import Data
from eos_search.estimators.differences import Differences
from eos_search.examples import Broken, Encoded, Encoder, Prepared, prepare
from eos_search.flow import straight
from eos_search.objective import Objective, TaskTerms, reference_rows, task_terms
from eos_search.relaxed import RelaxedModel
from eos_search.structure import Structure
from eos_search.theta import ThetaValues


class EncodedRows(Dataset[Encoded | Broken]):
    """Rows as a data set of torch: encoded when they are asked for, in whatever process asks."""

    def __init__(self, data: Data, encoder: Encoder) -> None:
        self.data, self.encoder = data, encoder

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, index: int) -> Encoded | Broken:
        return self.encoder.encode(index, self.data.rows[index])


_Known = tuple[Prepared, dict[int, torch.Tensor], torch.Tensor | None]


def example_terms(
    model: RelaxedModel,
    objective: Objective,
    example: Prepared,
    values: ThetaValues,
    structure: Structure,
    reference: dict[int, torch.Tensor],
    row: int = 0,
    answers: torch.Tensor | None = None,
) -> TaskTerms:
    """The task loss of one example, with gradients for all of Theta.

    Args:
        model: the frozen model, and how counts are estimated.
        objective: weights of the terms.
        example: what enters layer 0.
        values: Theta.
        structure: its hard reading.
        reference: :func:`eos_search.objective.reference_rows` of the unreduced pass.
        row: number of the example in the data.
        answers: logits of the unreduced pass at the answer, where the objective asks for them.
    """
    output = model.forward(example, values, structure, objective.aligned, row)
    run = output.run
    assert run is not None
    terms = task_terms(objective, run.example, output, reference, answers)
    if not run.structure.counts or not (torch.is_grad_enabled() and values.table.requires_grad):
        return terms

    def loss(place: int, count: int) -> float:
        with torch.no_grad():
            other = model.recount(output, place, count)
            assert other.run is not None
            return task_terms(objective, other.run.example, other, reference, answers).total.item()

    slopes = model.keep.slopes(run, row, loss)
    if slopes is None and structure.before and not isinstance(model.keep, Differences):
        # Positions follow the count there, so that no token comes or goes alone: differences are the only estimator.
        slopes = model.before.slopes(run, row, loss, places=(0,))
    if slopes is None:
        return terms
    return replace(terms, total=terms.total + (straight(run.soft.logs) * slopes).sum().to(terms.total.dtype))


@dataclass
class ModelTask:
    """The task loss of an encoded row; remembers what doesn't depend on Theta, up to ``cache_bytes``."""

    model: RelaxedModel
    objective: Objective
    visual_tokens: int
    cache_bytes: int = 0
    _remembered: dict[int, _Known] = field(default_factory=dict)

    def __call__(self, encoded: Encoded, values: ThetaValues, structure: Structure) -> TaskTerms:
        example, reference, answers = self._remembered.get(encoded.index) or self._prepare(encoded)
        return example_terms(self.model, self.objective, example, values, structure, reference, encoded.index, answers)

    def _prepare(self, encoded: Encoded) -> _Known:
        rule = self.model.rules.importance.queries
        select = self.model.rules.select
        example = prepare(self.model.model, encoded, rule, self.visual_tokens, select)
        last = len(self.model.decoder.layers) - 1 if self.objective.lambda_kl else None
        states = self.model.reference(example, {*self.objective.aligned, *([] if last is None else [last])})
        answers = None if last is None else self.model.answers(example, states[last])
        reference = reference_rows(self.objective, example, states)
        held = [example.embeddings, *reference.values(), *([] if answers is None else [answers])]
        held += [tensor for tower in example.towers for tensor in tower.tensors()]
        size = sum(tensor.nbytes for tensor in held)
        if size <= self.cache_bytes:
            self.cache_bytes -= size
            self._remembered[encoded.index] = example, reference, answers
        return example, reference, answers
