"""Prune, merge, pool and reweight: the paper's Listing 3, and that each check can fail."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.analysis import corners, equivalence
from eos_vllm.analysis.equivalence import Check, batch_check, corner_checks, gaussian_tokens, has_clear_nearest
from eos_vllm.core.operator import OperatorParams

PAPER = {"PRUNE": 0.0, "MERGE": 9.54e-07, "POOL": 4.77e-07, "REWEIGHT": 0.0}


def test_listing_3_prints_the_papers_figures() -> None:
    differences = {c.check: c.difference for c in corner_checks(*gaussian_tokens(42))}
    # Sums of a few float32 numbers: another processor may round them otherwise, but not by more than a factor.
    assert differences == pytest.approx(PAPER, rel=1.0, abs=0)


@given(seed=st.integers(0, 2**31))
def test_every_seed_is_within_the_bounds(seed: int) -> None:
    checks = [*corner_checks(*gaussian_tokens(seed)), batch_check(seed)]
    assert [c.check for c in checks] == ["PRUNE", "MERGE", "POOL", "REWEIGHT", "BATCH"]
    assert [c for c in checks if not c.ok] == []


@pytest.mark.parametrize(("field", "broken"), [("gamma", "MERGE POOL"), ("rho", "REWEIGHT")])
def test_a_wrong_operator_breaks_exactly_the_corners_it_touches(
    field: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = equivalence.unified_operator

    def wrong(anchors: torch.Tensor, discards: torch.Tensor, scores: torch.Tensor, p: OperatorParams) -> torch.Tensor:
        scaled = {"gamma": p.gamma, "rho": p.rho}
        scaled[field] *= 0.999
        return right(anchors, discards, scores, OperatorParams(scaled["gamma"], p.tau, p.theta, scaled["rho"], p.nu))

    monkeypatch.setattr(equivalence, "unified_operator", wrong)
    assert " ".join(c.check for c in corner_checks(*gaussian_tokens(42)) if not c.ok) == broken


def test_a_difference_that_is_no_number_is_no_success() -> None:
    assert not Check("X", float("nan"), 1.0).ok
    anchors, discards, scores = gaussian_tokens(0)
    assert not all(c.ok for c in corner_checks(anchors, discards * float("inf"), scores))


def test_prune_leaves_the_anchors_and_copies_them() -> None:
    anchors, discards, scores = gaussian_tokens(0)
    out = corners.prune(anchors, discards, scores)
    assert torch.equal(out, anchors)
    assert out.data_ptr() != anchors.data_ptr()


def test_merge_adds_each_discard_to_the_anchor_of_its_direction() -> None:
    anchors = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    discards = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.5, 0.0]])
    out = corners.merge(anchors, discards, torch.zeros(3))
    assert out.tolist() == [[12.5, 1.0], [1.0, 4.0]]


def test_pool_spreads_the_sum_of_the_discards_evenly() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    discards = torch.tensor([[2.0, 4.0], [4.0, 2.0], [0.0, 2.0]])
    assert corners.pool(anchors, discards, torch.zeros(3)).tolist() == [[4.0, 4.0], [3.0, 5.0]]


def test_reweight_shares_one_unit_of_importance_among_the_anchors() -> None:
    anchors, discards, scores = gaussian_tokens(5)
    factors = corners.reweight(anchors, discards, scores, alpha=1.5) / anchors
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    torch.testing.assert_close(((factors[:, 0] - 1) / 1.5).sum(), torch.tensor(1.0))


def test_discards_without_a_nearest_anchor_are_left_out_of_the_merge_and_counted() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    discards = torch.tensor([[1.0, 1.0], [1.0, 0.999], [1.0, 0.5]])
    assert has_clear_nearest(anchors, discards, tau=1e-4).tolist() == [False, False, True]
    assert has_clear_nearest(anchors, discards, tau=1e-9).tolist() == [False, True, True]
    assert has_clear_nearest(anchors[:1], discards, tau=1e-4).all()
    checks = {c.check: c for c in corner_checks(anchors, discards, torch.zeros(3))}
    assert checks["MERGE"].note == "2 of 3 discards left out, no single nearest anchor"
    assert checks["POOL"].note == ""
    assert all(c.ok for c in checks.values())
