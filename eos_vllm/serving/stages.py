"""What one pipeline stage passes on to the next beside hidden states, where a step prefills images.

The next stage works on the tokens that are left, so it has to know where they came from; and the rule ``relevant_text``
weighs text by the embeddings of layer 0, which only the first stage has. Tensors keep the rows of the unreduced batch,
for vLLM copies as many rows as the step has tokens.
"""

from typing import Any

import torch
from vllm.sequence import IntermediateTensors

ORIGIN, EMBEDDINGS = "eos_origin", "eos_embeddings"


def extend_intermediate_tensors(model: Any, embeddings: bool) -> None:
    """Makes vLLM's buffers between stages hold ours as well.

    Args:
        model: whose ``make_empty_intermediate_tensors`` vLLM calls.
        embeddings: whether later stages need those of layer 0.
    """
    make = model.make_empty_intermediate_tensors

    def with_ours(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        return fill(make(batch_size, dtype, device), embeddings)

    model.make_empty_intermediate_tensors = with_ours


def fill(tensors: IntermediateTensors, embeddings: bool) -> IntermediateTensors:
    """Adds ours to the tensors of a step without images: every step has every key."""
    hidden = tensors.tensors["hidden_states"]
    tensors.tensors[ORIGIN] = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    if embeddings:
        tensors.tensors[EMBEDDINGS] = torch.zeros_like(hidden)
    return tensors


def pack(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    origin: torch.Tensor | None,
    embeddings: torch.Tensor | None,
    rows: int,
) -> IntermediateTensors:
    """What a stage sends on.

    Args:
        hidden: tokens that are left ``[tokens, d]``.
        residual: theirs; None behind a reducer, which has added it.
        origin: row of the unreduced batch that each came from ``[tokens]``; None where all are left.
        embeddings: of layer 0 ``[unreduced tokens, d]``, where later stages need them.
        rows: of the unreduced batch, padding included.
    """
    sent = {
        "hidden_states": hidden,
        "residual": torch.zeros_like(hidden) if residual is None else residual,
        ORIGIN: torch.arange(len(hidden), device=hidden.device) if origin is None else origin,
    }
    if embeddings is not None:
        sent[EMBEDDINGS] = embeddings
    return IntermediateTensors({name: _padded(tensor, rows) for name, tensor in sent.items()})


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    out = tensor.new_zeros(rows, *tensor.shape[1:])
    out[: len(tensor)] = tensor
    return out
