"""The unified operator against a term-by-term transcription of Listing 1 in float64, and its limits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.analysis.equivalence import gaussian_tokens
from eos_vllm.core.operator import OperatorParams, unified_operator

# Of gamma, tau, theta, rho and nu, in hundredths: whole numbers are what hypothesis shrinks quickly.
RANGES = ((0, 100), (5, 500), (-100, 100), (0, 100), (0, 100))
OMEGA = OperatorParams(gamma=0.3, tau=0.22, theta=0.1, rho=0.7, nu=0.4)


def hundredths(number: int) -> float:
    return number / 100


def naive(anchors: Any, discards: Any, scores: Any, p: OperatorParams) -> torch.Tensor:
    """Listing 1, Eq. 2 to 7, one number at a time."""
    a, d, s = (x.double().tolist() for x in (anchors, discards, scores))
    kept, gone, width = len(a), len(d), len(a[0])

    def dot(x: list[float], y: list[float]) -> float:
        return sum(i * j for i, j in zip(x, y, strict=True))

    def softmax(x: list[float]) -> list[float]:
        e = [math.exp(v - max(x)) for v in x]
        return [v / sum(e) for v in e]

    cosine = [[dot(t, k) / math.sqrt(dot(t, t) * dot(k, k)) for k in a] for t in d]
    assignment = [softmax([c / p.tau for c in row]) for row in cosine]
    gate = [1 / (1 + math.exp(-p.gate_sharpness * (max(row) - p.theta))) for row in cosine]
    closeness, candidate = [softmax(row) for row in cosine], softmax(s)
    out = []
    for k in range(kept):
        moved = [sum(assignment[j][k] * gate[j] * d[j][i] for j in range(gone)) for i in range(width)]
        importance = sum(closeness[j][k] * candidate[j] for j in range(gone))
        out.append([(a[k][i] + p.gamma * moved[i]) * (1 + p.rho * importance) for i in range(width)])
    if p.norm == "token":
        ratios = [math.sqrt(dot(a[k], a[k]) / dot(out[k], out[k])) for k in range(kept)]
    else:
        ratios = [math.sqrt(sum(dot(t, t) for t in a) / sum(dot(t, t) for t in out))] * kept
    blended = [[(1 - p.nu) * v + p.nu * v * ratio for v in row] for row, ratio in zip(out, ratios, strict=True)]
    return torch.tensor(blended, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["token", "frobenius"])
@given(
    kept=st.integers(1, 5),
    gone=st.integers(1, 6),
    omega=st.tuples(*(st.integers(low, high).map(hundredths) for low, high in RANGES)),
    seed=st.integers(0, 2**20),
)
def test_equals_listing_1_in_double_precision(norm: Any, kept: int, gone: int, omega: Any, seed: int) -> None:
    tokens = gaussian_tokens(seed, kept, gone, width=8)
    params = OperatorParams(*omega, norm=norm)
    torch.testing.assert_close(unified_operator(*tokens, params).double(), naive(*tokens, params), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("norm", ["token", "frobenius"])
def test_a_batch_equals_its_images_one_by_one(norm: Any) -> None:
    params = OperatorParams(0.3, 0.22, 0.1, 0.7, 0.4, norm=norm)
    images = [gaussian_tokens(seed) for seed in range(5)]
    together = unified_operator(*(torch.stack(parts) for parts in zip(*images, strict=True)), params)
    for image, row in zip(images, together, strict=True):
        torch.testing.assert_close(row, unified_operator(*image, params))


def test_full_norm_preservation_keeps_each_norm_and_changes_directions() -> None:
    anchors, discards, scores = gaussian_tokens(0)
    out = unified_operator(anchors, discards, scores, OperatorParams(0.5, 0.2, -1.0, 0.5, nu=1.0))
    torch.testing.assert_close(out.norm(dim=-1), anchors.norm(dim=-1))
    assert (torch.cosine_similarity(out, anchors, dim=-1) < 0.99).any()


def test_frobenius_keeps_the_norm_of_the_matrix_but_not_of_each_token() -> None:
    anchors, discards, scores = gaussian_tokens(0)
    params = OperatorParams(0.5, 0.2, -1.0, 0.5, nu=1.0, norm="frobenius")
    out = unified_operator(anchors, discards, scores, params)
    torch.testing.assert_close(out.norm(), anchors.norm())
    assert (out.norm(dim=-1) - anchors.norm(dim=-1)).abs().max() > 0.1


def test_without_transfer_and_reweighting_anchors_pass_bit_by_bit() -> None:
    anchors, discards, scores = gaussian_tokens(1)
    for nu in (0.0, 1.0):
        out = unified_operator(anchors, discards, scores, OperatorParams(0.0, 0.3, 0.0, 0.0, nu))
        assert torch.equal(out, anchors)


def test_without_discards_anchors_pass_even_off_the_prune_corner() -> None:
    anchors, discards, scores = gaussian_tokens(1)
    assert torch.equal(unified_operator(anchors, discards[:0], scores[:0], OMEGA), anchors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_cast_back_once(dtype: torch.dtype) -> None:
    anchors, discards, scores = (x.to(dtype) for x in gaussian_tokens(2))
    out = unified_operator(anchors, discards, scores, OMEGA)
    assert out.dtype == dtype
    assert torch.equal(out, unified_operator(anchors.float(), discards.float(), scores.float(), OMEGA).to(dtype))


def test_zero_tokens_give_numbers() -> None:
    zeros = torch.zeros(3, 4)
    out = unified_operator(zeros, torch.zeros(2, 4), torch.zeros(2), OperatorParams(1.0, 0.1, 0.0, 1.0, 1.0))
    assert torch.equal(out, zeros)


@pytest.mark.parametrize("name", ["gamma", "tau", "theta", "rho", "nu"])
def test_each_parameter_has_a_gradient_that_agrees_with_finite_differences(name: str) -> None:
    anchors, discards, scores = gaussian_tokens(3)
    values = {"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.7, "nu": 0.4}

    def loss(x: float | torch.Tensor) -> torch.Tensor:
        out = unified_operator(anchors, discards, scores, OperatorParams(**{**values, name: x}))
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    variable = torch.tensor(values[name], requires_grad=True)
    loss(variable).backward()
    assert variable.grad is not None
    step = 1e-2
    slope = (loss(values[name] + step) - loss(values[name] - step)) / (2 * step)
    torch.testing.assert_close(variable.grad, slope, rtol=2e-2, atol=1e-3)
    assert variable.grad.abs() > 1e-3


def test_tensor_parameters_are_never_taken_for_the_prune_corner() -> None:
    zero = torch.tensor(0.0, requires_grad=True)
    assert not OperatorParams(zero, 1.0, 0.0, 0.0, 0.0).is_identity
    assert not OperatorParams(0.0, 1.0, 0.0, zero, 0.0).is_identity
    assert OperatorParams(0.0, 1.0, 0.0, 0.0, 0.5).is_identity


def test_a_vanishing_temperature_is_a_hard_merge_and_no_nan() -> None:
    anchors, discards, scores = torch.randn(4, 16), torch.randn(9, 16), torch.randn(9)
    hard = unified_operator(anchors, discards, scores, OperatorParams(1.0, 1e-5, -1.0, 0.0, 0.0))
    harder = unified_operator(anchors, discards, scores, OperatorParams(1.0, 1e-45, -1.0, 0.0, 0.0))
    assert torch.isfinite(harder).all()
    torch.testing.assert_close(harder, hard)
