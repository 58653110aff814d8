"""Corners of a profile: its layers, counts and choice, with a canonical reduction as operator."""

import pytest
import torch

from eos_search.corners import CORNERS, at_corner
from eos_search.evaluation import cases
from eos_vllm import profiles
from eos_vllm.analysis import corners
from eos_vllm.analysis.equivalence import gaussian_tokens
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError
from eos_vllm.core.operator import OperatorParams, unified_operator

BASE = profiles.load("embedded-eos")


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_the_canonical_reduction(corner: str) -> None:
    changed = at_corner(BASE, corner)
    anchors, discards, scores = gaussian_tokens(0)
    rest = (1.0,) if corner == "reweight" else ()
    expected = getattr(corners, corner)(anchors, discards, scores, *rest)
    for reducer in changed.reducers:
        params = OperatorParams(
            reducer.gamma, reducer.tau, reducer.theta, reducer.rho, reducer.nu, changed.operator.gate_sharpness
        )
        assert float((unified_operator(anchors, discards, scores, params) - expected).abs().max()) <= 2e-6
        assert corner == "prune" or not torch.equal(expected, anchors)


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_has_the_profiles_layers_counts_and_choice(corner: str) -> None:
    changed = at_corner(BASE, corner)
    assert changed.layers == BASE.layers
    assert changed.importance == BASE.importance
    for budget in (192, 64, 16):
        assert kept_counts(changed, budget) == kept_counts(BASE, budget)


def test_corners_are_cases_of_an_evaluation() -> None:
    (case,) = cases(["merge@embedded-eos"], [32])
    assert (case.name, case.selection, case.profile) == ("merge@embedded-eos", None, at_corner(BASE, "merge"))
    with pytest.raises(EosError, match="no corner of the operator"):
        at_corner(BASE, "best")
