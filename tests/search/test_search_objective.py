"""The objective: one-sided constraints, counts, and the alignment of text and visual states."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_search.examples import Prepared
from eos_search.flow import States
from eos_search.objective import Objective, penalties, reference_rows, task_terms, tokens_left
from eos_search.relaxed import RelaxedOutput
from eos_search.theta import KINDS, ThetaValues
from eos_vllm.core.plan import ImageSpan

GATES = st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4)


def values_of(gates: list[float], discards: list[float]) -> ThetaValues:
    """A point with a closed last layer."""
    table = torch.full((5, 7), 0.5, dtype=torch.float64)
    table[:, 0] = torch.tensor([*gates, 0.0], dtype=torch.float64)
    table[:, 1] = torch.tensor([*discards, 0.5], dtype=torch.float64)
    return ThetaValues(table.requires_grad_())


def gradient_of(term: torch.Tensor, values: ThetaValues) -> dict[str, torch.Tensor]:
    gradient = torch.autograd.grad(term, values.table, retain_graph=True)[0]
    return dict(zip(KINDS, gradient.unbind(dim=1), strict=True))


@given(GATES, GATES, st.integers(1, 100))
def test_the_budget_penalty_is_one_sided(gates: list[float], discards: list[float], budget: int) -> None:
    objective = Objective(budget, 2, 100, (), lambda_budget=3.0, budget_gates="all")
    values = values_of(gates, discards)
    found = penalties(objective, values, ())
    left = 100.0
    for gate, discard in zip(gates, discards, strict=True):
        left *= 1 - gate * discard
    assert found.tokens.item() == pytest.approx(left, rel=1e-9)
    excess = left / budget - 1
    gradient = gradient_of(found.budget, values)
    if excess <= 0:
        assert found.budget.item() == 0
        assert all((column == 0).all() for column in gradient.values())
        return
    assert found.budget.item() == pytest.approx(3.0 * excess**2, rel=1e-6)
    for layer, (gate, discard) in enumerate(zip(gates, discards, strict=True)):
        outer = 3.0 * 2 * excess / budget * left / (1 - gate * discard)
        assert gradient["gate"][layer].item() == pytest.approx(-outer * discard, rel=1e-6)
        assert gradient["discard"][layer].item() == pytest.approx(-outer * gate, rel=1e-6)


@given(GATES, st.integers(1, 4))
def test_the_cost_penalty_is_one_sided(gates: list[float], most: int) -> None:
    objective = Objective(10, most, 100, (), lambda_cost=5.0)
    values = values_of(gates, [0.5] * 4)
    found = penalties(objective, values, ())
    excess = sum(gates) - most
    gradient = gradient_of(found.cost, values)
    if excess <= 0:
        assert found.cost.item() == 0
        assert all((column == 0).all() for column in gradient.values())
        return
    assert found.cost.item() == pytest.approx(5.0 * excess**2, rel=1e-6)
    torch.testing.assert_close(gradient["gate"], torch.full((5,), 10.0 * excess, dtype=torch.float64))
    assert (gradient["discard"] == 0).all()


def test_closed_gates_count_in_the_gradient_alone() -> None:
    objective = Objective(10, 2, 100, ())
    values = values_of([0.8, 0.3, 0.9, 0.2], [0.5, 0.6, 0.4, 0.7])
    left = tokens_left(objective, values, (0, 2))
    assert left.item() == pytest.approx(100 * (1 - 0.4) * (1 - 0.36))
    gradient = gradient_of(left, values)
    assert gradient["gate"][1].item() == pytest.approx(-0.6 * left.item())
    assert gradient["gate"][0].item() == pytest.approx(-0.5 * left.item() / 0.6)
    assert gradient["discard"][1].item() == 0


def test_the_layer_average_is_what_layers_see() -> None:
    objective = Objective(10, 2, 100, (), budget_measure="layer_average")
    values = values_of([0.5, 0.0, 0.5, 0.0], [1.0, 0.5, 0.5, 0.5])
    # Layer 0 sees 100, 1 and 2 see 50, 3 and 4 see 37.5.
    assert tokens_left(objective, values, (0, 2)).item() == pytest.approx((100 + 50 + 50 + 37.5 + 37.5) / 5)


def made_example() -> tuple[Prepared, dict[int, torch.Tensor], RelaxedOutput]:
    """Five tokens of which 1 to 3 are visual; 2 is gone behind layer 1."""
    generator = torch.Generator().manual_seed(0)
    full = {layer: torch.randn(5, 4, generator=generator) for layer in (0, 1)}
    is_text = torch.tensor([True, False, False, False, True])
    example = Prepared("x", torch.zeros(5, 4), (ImageSpan(1, 3),), 4, torch.tensor([1]), torch.ones(1, 1), is_text)
    reduced = {0: States(full[0] + 1.0, torch.arange(5))}
    kept = torch.tensor([0, 1, 3, 4])
    change = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    reduced[1] = States(full[1][kept] + change, kept)
    return example, full, RelaxedOutput(torch.tensor([[0.0, 2.0, 1.0]]), reduced, [])


@pytest.mark.parametrize(
    ("align_on", "expected"), [("text", (1 + (1 + 16) / 2) / 2), ("visual", (1 + (4 + 9) / 2) / 2)]
)
def test_alignment_is_over_the_wanted_rows(align_on: Any, expected: float) -> None:
    example, full, output = made_example()
    objective = Objective(1, 1, 3, (0, 1), align_on=align_on, lambda_align=0.25)
    terms = task_terms(objective, example, output, reference_rows(objective, example, full))
    entropy = torch.nn.functional.cross_entropy(output.logits, example.targets).item()
    assert terms.alignment.item() == pytest.approx(expected, rel=1e-5)
    assert terms.cross_entropy.item() == pytest.approx(entropy)
    assert terms.total.item() == pytest.approx(entropy + 0.25 * expected, rel=1e-5)


def test_cross_entropy_and_alignment_can_be_off() -> None:
    example, full, output = made_example()
    objective = Objective(1, 1, 3, (0, 1), cross_entropy=False, lambda_align=2.0)
    rows = reference_rows(objective, example, full)
    terms = task_terms(objective, example, output, rows)
    assert terms.total.item() == pytest.approx(2 * terms.alignment.item())
    assert terms.cross_entropy.item() > 0
    off = replace(objective, cross_entropy=True, lambda_align=0.0)
    assert off.aligned == ()
    assert task_terms(off, example, output, {}).total.item() == pytest.approx(terms.cross_entropy.item())
