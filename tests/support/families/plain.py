"""What a reducer computes, written out one token at a time in float64: scores, choices, the unified operator.

The second opinion of ``eos_vllm/core``; nothing here comes from there. Equation numbers are those of arXiv 2606.05232.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the vector ``a`` ``[d]`` to each row of ``b`` ``[n, d]``; a vector of length 0 has cosine 0."""
    lengths = a.norm().clamp(min=1e-12) * b.norm(dim=1).clamp(min=1e-12)
    return (b @ a) / lengths


def operate(
    anchors: Tensor, discards: Tensor, scores: Tensor, reducer: Mapping[str, Any], options: Mapping[str, Any]
) -> Tensor:
    """Listing 1: what the kept tokens ``[K, d]`` become of the discarded ones ``[M, d]`` with their scores ``[M]``.

    ``reducer`` and ``options`` are the profile's own, the latter its ``operator``.
    """
    before, gone = anchors.double(), discards.double()
    out, received, importance = before.clone(), torch.zeros(len(before)), torch.zeros(len(before), dtype=torch.float64)
    received = received.double()
    candidate = scores.double().softmax(dim=0)
    for m, token in enumerate(gone):
        similarity = cosine(token, before)
        assignment = (similarity / max(reducer["tau"], 1e-6)).softmax(dim=0)  # Eq. 2
        gate = torch.sigmoid(options["gate_sharpness"] * (similarity.max() - reducer["theta"]))  # Eq. 4
        out += reducer["gamma"] * gate * assignment[:, None] * token  # Eq. 3
        received += gate * assignment
        importance += similarity.softmax(dim=0) * candidate[m]  # Eq. 5
    if options.get("aggregate", "sum") == "mean":
        out = out / (1 + reducer["gamma"] * received)[:, None]
    out = out * (1 + reducer["rho"] * importance)[:, None]
    if options["norm"] == "token":
        ratio = before.norm(dim=1, keepdim=True) / out.norm(dim=1, keepdim=True).clamp(min=1e-6)
    else:
        ratio = before.norm() / (out.norm() + 1e-6)
    out = (1 - reducer["nu"]) * out + reducer["nu"] * ratio * out  # Eq. 6
    return out.to(anchors.dtype)


def relevant(visual: Tensor, text: Tensor) -> list[int]:
    """SparseVLM's rater rule: places of the text ``[T, d]`` that visual tokens ``[N, d]`` look at more than average.

    Both as they enter decoder layer 0. All places where none is above average.
    """
    looked = torch.zeros(len(text), dtype=torch.float64)
    for token in visual.double():
        looked += (text.double() @ token).softmax(dim=0)
    share = looked / len(visual)
    return [t for t in range(len(text)) if share[t] > share.mean()] or list(range(len(text)))


def highest(scores: Sequence[float], count: int) -> list[int]:
    """Places of the ``count`` highest scores, ascending; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def every_nth(count: int, total: int) -> list[int]:
    """Selector ``uniform``: the middle of each of ``count`` equal stretches of ``total`` places."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def farthest(rows: Tensor, count: int) -> list[int]:
    """Selector ``maxmin``: rows ``[N, d]``, each the farthest by cosine from those before it.

    The first is the one whose nearest neighbour is farthest away.
    """
    distance = torch.stack([1 - cosine(row, rows.double()) for row in rows.double()])
    distance.fill_diagonal_(torch.inf)
    nearest = distance.min(dim=1).values
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(nearest.argmax())
        nearest = distance[best].clone() if not chosen else torch.minimum(nearest, distance[best])
        chosen.append(best)
        nearest[chosen] = -torch.inf
    return sorted(chosen)
