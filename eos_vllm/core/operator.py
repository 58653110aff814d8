"""The unified reduction operator (paper Listing 1, Eq. 2 to 7): one formula for prune, merge, pool and reweight."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

NORM_FLOOR = 1e-6
TAU_FLOOR = 1e-6  # below it similarity / tau overflows float32; the assignment is one-hot long before
Scalar = float | torch.Tensor


@dataclass(frozen=True)
class OperatorParams:
    """Omega of Definition 2.1 with the gate sharpness beta of Eq. 4; plain floats, or tensors while searching."""

    gamma: Scalar
    tau: Scalar
    theta: Scalar
    rho: Scalar
    nu: Scalar
    gate_sharpness: float = 10.0
    norm: Literal["token", "frobenius"] = "token"
    aggregate: Literal["sum", "mean"] = "sum"

    @property
    def is_identity(self) -> bool:
        """True where anchors pass unchanged: no transfer and no reweighting (the prune corner, Eq. 15)."""
        return all(not isinstance(x, torch.Tensor) and x == 0 for x in (self.gamma, self.rho))


def unified_operator(
    anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor, params: OperatorParams
) -> torch.Tensor:
    """Lets discarded tokens act on the kept ones.

    Args:
        anchors: kept tokens A, ``[..., K, d]``, any floating dtype.
        discards: discarded tokens D, ``[..., M, d]``.
        scores: importance of the discards, ``[..., M]`` (only read where ``rho`` is not 0).
        params: Omega; ``norm="token"`` preserves each token's norm (Listing 1), ``"frobenius"`` the matrix' (Eq. 6).
            ``aggregate="mean"`` divides what an anchor became by one plus the weight of all that it received, as
            VScan's and ToMe's means do; ``"sum"`` is Eq. 3.

    Returns:
        Tokens ``[..., K, d]`` in the dtype of ``anchors``; computed in float32 throughout.
    """
    if params.is_identity or discards.shape[-2] == 0:
        return anchors
    kept, gone = anchors.float(), discards.float()
    similarity = F.normalize(gone, dim=-1) @ F.normalize(kept, dim=-1).mT
    tau = params.tau.clamp(min=TAU_FLOOR) if isinstance(params.tau, torch.Tensor) else max(params.tau, TAU_FLOOR)
    assignment = F.softmax(similarity / tau, dim=-1)
    gate = torch.sigmoid(params.gate_sharpness * (similarity.amax(dim=-1) - params.theta))
    out = kept + params.gamma * (assignment.mT @ (gone * gate.unsqueeze(-1)))
    if params.aggregate == "mean":
        out = out / (1.0 + params.gamma * (assignment.mT @ gate.unsqueeze(-1)))
    candidate = F.softmax(scores.float(), dim=-1).unsqueeze(-1)
    importance = (F.softmax(similarity, dim=-1) * candidate).sum(dim=-2)
    out = out * (1.0 + params.rho * importance.unsqueeze(-1))
    out = (1.0 - params.nu) * out + params.nu * (out * _norm_ratio(kept, out, params.norm))
    return out.to(anchors.dtype)


def _norm_ratio(before: torch.Tensor, after: torch.Tensor, norm: str) -> torch.Tensor:
    if norm == "token":
        return before.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    over = (-2, -1)
    return before.norm(dim=over, keepdim=True) / (after.norm(dim=over, keepdim=True) + NORM_FLOOR)
