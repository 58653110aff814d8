"""The paper's Listing 3: each canonical reduction equals the unified operator at one corner of its parameters."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from eos_vllm.analysis import corners
from eos_vllm.core.operator import OperatorParams, unified_operator

# Listing 3's stand-ins for theta -> -infinity (every per-token gate is 1), tau -> infinity and tau -> 0.
NO_GATE = -1e9
POOL_TAU = 1e6
MERGE_TAU = 1e-4
ALPHA = 1.5
# The unified sums and the corners' loops add the same float32 numbers in another order.
ROUNDING = 2e-6
# Cosines that differ by less are equal in float32: which anchor is nearest is not defined.
_TIE = 1e-6
# Temperatures by which two cosines must differ for the softmax to be one-hot: exp(-20) is far below ROUNDING.
_ONE_HOT = 20.0


@dataclass(frozen=True)
class Check:
    """One figure held against its bound: ``difference`` is the largest elementwise one."""

    check: str
    difference: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bound holds; a difference that is no number breaks it."""
        return self.difference <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``eos-vllm verify --json``."""
        return {**asdict(self), "ok": self.ok}


def gaussian_tokens(
    seed: int, anchors: int = 8, discards: int = 16, width: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The listing's tokens: anchors ``[K, d]``, discards ``[M, d]`` and scores ``[M]``, independent and normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((anchors, width), (discards, width), (discards,))
    kept, gone, scores = (torch.randn(shape, generator=generator) for shape in shapes)
    return kept, gone, scores


def corner_checks(
    anchors: torch.Tensor,
    discards: torch.Tensor,
    scores: torch.Tensor,
    merge_tau: float = MERGE_TAU,
    relative: bool = False,
) -> list[Check]:
    """Holds the unified operator at its four corners against :mod:`eos_vllm.analysis.corners`.

    Args:
        anchors: ``[K, d]``.
        discards: ``[M, d]``. Discards whose nearest anchor ``merge_tau`` cannot single out are left out of the merge,
            which is the limit tau -> 0; the check's note says how many.
        scores: ``[M]``.
        merge_tau: stand-in for tau -> 0; smaller ones leave out fewer discards.
        relative: divide by the largest magnitude of the result. Float32 rounds relative to size, and real hidden
            states are not of unit size.

    Returns:
        PRUNE and REWEIGHT with bound 0, MERGE and POOL with bound :data:`ROUNDING`.
    """
    clear = has_clear_nearest(anchors, discards, merge_tau)
    left_out = int((~clear).sum())
    note = f"{left_out} of {len(discards)} discards left out, no single nearest anchor" if left_out else ""
    cases: list[tuple[str, torch.Tensor, tuple[float, ...], Callable[..., torch.Tensor], float]] = [
        ("PRUNE", torch.ones_like(clear), (0.0, 1.0, 0.0), corners.prune, 0.0),
        ("MERGE", clear, (1.0, merge_tau, 0.0), corners.merge, ROUNDING),
        ("POOL", torch.ones_like(clear), (1.0, POOL_TAU, 0.0), corners.pool, ROUNDING),
        ("REWEIGHT", torch.ones_like(clear), (0.0, 1.0, ALPHA), _reweight, 0.0),
    ]
    checks = []
    for name, chosen, (gamma, tau, rho), reference, bound in cases:
        gone, share = discards[chosen], scores[chosen]
        unified = unified_operator(anchors, gone, share, OperatorParams(gamma, tau, NO_GATE, rho, 0.0))
        expected = reference(anchors, gone, share)
        size = float(expected.abs().max()) if relative else 1.0
        difference = float((unified - expected).abs().max()) / size
        checks.append(Check(name, difference, bound, note if name == "MERGE" else ""))
    return checks


def has_clear_nearest(anchors: torch.Tensor, discards: torch.Tensor, tau: float) -> torch.Tensor:
    """Which discards ``[M]`` have one anchor so much nearer than the next that a softmax of ``tau`` is one-hot."""
    if len(anchors) == 1:
        return torch.ones(len(discards), dtype=torch.bool)
    cosines = F.normalize(discards, dim=-1) @ F.normalize(anchors, dim=-1).T
    best = cosines.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1] > max(_TIE, _ONE_HOT * tau)


def batch_check(seed: int, batch: int = 4) -> Check:
    """Holds a batched call, all parameters away from their corners, against one call for each image."""
    images = [gaussian_tokens(seed + i) for i in range(batch)]
    params = OperatorParams(gamma=0.083, tau=0.22, theta=0.1, rho=0.5, nu=0.5)
    kept, gone, scores = (torch.stack(parts) for parts in zip(*images, strict=True))
    together = unified_operator(kept, gone, scores, params)
    alone = torch.stack([unified_operator(*image, params) for image in images])
    return Check("BATCH", float((together - alone).abs().max()), ROUNDING)


def _reweight(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return corners.reweight(anchors, discards, scores, ALPHA)
