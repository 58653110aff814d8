"""The four canonical reductions as independent algorithms (paper Listing 2), to hold the unified operator against.

Nothing here calls, or is called by, :mod:`eos_vllm.core.operator`; one image at a time, loops where that is plainest.
"""

import torch


def prune(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Keeps the anchors ``[K, d]`` as they are; the discards leave no trace (FastV, SparseVLM)."""
    return anchors.clone()


def merge(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Adds each discard ``[M, d]`` to the one anchor that is nearest by cosine (ToMe's additive merge, Eq. 18)."""
    out = anchors.clone()
    lengths = torch.linalg.vector_norm(anchors, dim=1)
    for token in discards:
        cosines = (anchors @ token) / lengths
        out[int(cosines.argmax())] += token
    return out


def pool(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Spreads the sum of the discards evenly over all anchors (Eq. 20)."""
    return anchors + discards.sum(dim=0) / len(anchors)


def reweight(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scales each anchor by ``1 + alpha p``, p being the importance of the discards it stands for (Eq. 7 and 22)."""
    unit_anchors = torch.nn.functional.normalize(anchors, dim=1)
    unit_discards = torch.nn.functional.normalize(discards, dim=1)
    closeness = torch.softmax(unit_discards @ unit_anchors.T, dim=1)
    share = torch.softmax(scores, dim=0)
    stands_for = (closeness * share[:, None]).sum(dim=0)
    return anchors * (1.0 + alpha * stands_for[:, None])
