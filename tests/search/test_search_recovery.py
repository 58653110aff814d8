"""Recovery: on tokens whose best operator is a corner by construction, the search ends near that corner.

theta is held where transfer is open, as at the paper's corners: else a closed transfer gate does what gamma 0 does. For
the same reason rho counts as far as nu leaves it: where gamma is 0, anchors are scaled by about 1 + (1 - nu) rho p.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from search_cases import make_rules, make_settings

from eos_search.loop import Trainer
from eos_search.objective import Objective, TaskTerms
from eos_search.structure import Structure
from eos_search.theta import KINDS, Theta, ThetaValues
from eos_vllm.analysis import corners
from eos_vllm.core.operator import OperatorParams, unified_operator

STEPS, BATCH, LR = 400, 2, 0.2
START = {"gate": 0.95, "discard": 0.5, "gamma": 0.5, "tau": 0.5, "theta": -0.99, "rho": 0.5, "nu": 0.4}


@dataclass(frozen=True)
class Planted:
    """Tokens, and what the best operator makes of them."""

    id: str
    anchors: torch.Tensor
    discards: torch.Tensor
    scores: torch.Tensor
    target: torch.Tensor


def planted(seed: int, corner: Callable[..., torch.Tensor]) -> Planted:
    """Six anchors, and 18 discards that lie near one each: nearest and average differ."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(6, 24, generator=generator)
    discards = anchors.repeat(3, 1) + 0.7 * torch.randn(18, 24, generator=generator)
    scores = torch.randn(18, generator=generator)
    return Planted(str(seed), anchors, discards, scores, corner(anchors, discards, scores))


def search(corner: Callable[..., torch.Tensor], folder: Path) -> tuple[dict[str, float], float]:
    """Values at layer 0 after a search for the corner, and the mean squared error that is left."""
    settings = make_settings(
        folder, folder, steps=STEPS, batch_size=BATCH, learning_rate=LR, frozen=("gate", "discard", "theta")
    )
    theta = Theta.from_values(torch.tensor([[START[kind] for kind in KINDS]] * 2))
    rules = make_rules(max_reducers=1, depth=2)
    trainer = Trainer(theta, rules, Objective(36, 1, 36, ()), settings, Accelerator())
    losses = []

    def task(example: Planted, values: ThetaValues, structure: Structure) -> TaskTerms:
        assert structure.acting == (0,)
        row = dict(zip(KINDS, values.table[0].unbind(), strict=True))
        params = OperatorParams(*(row[kind] for kind in ("gamma", "tau", "theta", "rho", "nu")))
        out = unified_operator(example.anchors, example.discards, example.scores, params)
        loss = F.mse_loss(out, example.target)
        losses.append(loss.item())
        return TaskTerms(torch.zeros(()), loss, loss)

    for step in range(STEPS):
        trainer.step([planted(step * BATCH + i, corner) for i in range(BATCH)], task)
    end = dict(zip(KINDS, theta().table[0].tolist(), strict=True))
    assert (end["gate"], end["discard"]) == (pytest.approx(0.95), pytest.approx(0.5))
    assert sum(losses[:20]) > 5 * sum(losses[-20:])
    return end, sum(losses[-20:]) / 20


def test_prune(tmp_path: Path) -> None:
    end, left = search(corners.prune, tmp_path)
    assert end["gamma"] < 0.05
    assert end["rho"] * (1 - end["nu"]) < 0.05
    assert left < 3e-3


def test_merge(tmp_path: Path) -> None:
    end, left = search(corners.merge, tmp_path)
    assert end["gamma"] > 0.9
    assert end["tau"] < 0.05
    assert end["nu"] < 0.1
    assert left < 0.05


def test_pool(tmp_path: Path) -> None:
    end, left = search(corners.pool, tmp_path)
    assert end["gamma"] > 0.9
    assert end["tau"] > 3
    assert end["nu"] < 0.15
    assert left < 0.05


def test_reweight(tmp_path: Path) -> None:
    def strongest(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return corners.reweight(anchors, discards, scores, 1.0)

    end, left = search(strongest, tmp_path)
    assert end["gamma"] < 0.05
    assert end["rho"] * (1 - end["nu"]) > 0.55
    assert left < 5e-3
