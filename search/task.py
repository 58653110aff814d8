"""The task loss of a row of the data: encoded in a loader's process, embedded and run on the model's device."""

from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from eos_search.data import Data
from eos_search.examples import Broken, Encoded, Encoder, Prepared, prepare
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


@dataclass
class ModelTask:
    """The task loss of an encoded row; remembers what doesn't depend on Theta, up to ``cache_bytes``."""

    model: RelaxedModel
    objective: Objective
    visual_tokens: int
    cache_bytes: int = 0
    _remembered: dict[int, tuple[Prepared, dict[int, torch.Tensor]]] = field(default_factory=dict)

    def __call__(self, encoded: Encoded, values: ThetaValues, structure: Structure) -> TaskTerms:
        example, reference = self._remembered.get(encoded.index) or self._prepare(encoded)
        output = self.model.forward(example, values, structure, self.objective.aligned)
        return task_terms(self.objective, example, output, reference)

    def _prepare(self, encoded: Encoded) -> tuple[Prepared, dict[int, torch.Tensor]]:
        rule = self.model.rules.importance.queries
        example = prepare(self.model.model, encoded, rule, self.visual_tokens)
        states = self.model.reference(example, self.objective.aligned)
        reference = reference_rows(self.objective, example, states)
        size = sum(tensor.nbytes for tensor in (example.embeddings, *reference.values()))
        if size <= self.cache_bytes:
            self.cache_bytes -= size
            self._remembered[encoded.index] = example, reference
        return example, reference
