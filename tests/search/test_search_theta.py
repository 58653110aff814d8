"""Theta: maps, inverse, starts and placements."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_search.objective import Objective, tokens_left
from eos_search.theta import DISCARD_LIMIT, KINDS, Ranges, Theta, default_placement, start_values
from eos_vllm.core.errors import EosError, SettingError


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_maps_are_equation_10() -> None:
    raw = torch.tensor([[0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9]] * 2)
    values = Theta(raw, Ranges(gate_scale=3.0, discard_scale=2.0, epsilon=0.01))()
    x = [float(v) for v in raw[0].double()]
    expected = {
        "gate": sigmoid(3 * x[0]),
        "discard": sigmoid(2 * x[1]),
        "gamma": sigmoid(x[2]),
        "tau": math.log1p(math.exp(x[3])) + 0.01,
        "theta": 2 * sigmoid(x[4]) - 1,
        "rho": sigmoid(x[5]),
        "nu": sigmoid(x[6]),
    }
    for kind in KINDS:
        assert values.column(kind)[0].item() == pytest.approx(expected[kind], rel=1e-12)


@given(
    st.lists(st.floats(-60, 60), min_size=7, max_size=7),
)
def test_any_point_is_in_range(row: list[float]) -> None:
    values = Theta(torch.tensor([row, row], dtype=torch.float64))()
    for kind in ("gate", "discard", "gamma", "rho", "nu"):
        assert 0 <= values.column(kind).min().item() <= values.column(kind).max().item() <= 1
    assert values.column("tau").min().item() > 0
    assert values.column("theta").abs().max().item() <= 1
    assert (1 - values.gate * values.discard).min().item() > 0
    assert values.discard.max().item() <= DISCARD_LIMIT


@given(st.lists(st.floats(0.01, 0.99), min_size=7, max_size=7))
def test_values_come_back_from_their_raw_numbers(row: list[float]) -> None:
    table = torch.tensor([row, row], dtype=torch.float64)
    values = Theta.from_values(table, Ranges(gate_scale=7.0, discard_scale=0.5))()
    torch.testing.assert_close(values.table[0], table[0], rtol=1e-9, atol=1e-9)


def test_the_last_layer_is_no_place() -> None:
    theta = Theta(torch.ones(3, 7))
    values = theta()
    assert values.gate[-1].item() == 0
    assert values.gate[0].item() > 0.5
    values.gate.sum().backward()
    assert theta.raw.grad is not None
    assert theta.raw.grad[-1].abs().max().item() == 0


@pytest.mark.parametrize("name", ["warm", "uniform"])
@given(
    depth=st.integers(4, 40),
    visual=st.integers(2, 600),
    share=st.floats(0.05, 1),
    count=st.integers(1, 3),
)
def test_a_start_meets_both_constraints(name: str, depth: int, visual: int, share: float, count: int) -> None:
    budget = max(1, int(share * visual))
    placement = default_placement(depth, count)
    values = Theta.from_values(start_values(name, depth, visual, budget, count, placement))()  # type: ignore[arg-type]
    assert values.gate.sum().item() <= count + 1e-9
    acting = [layer for layer, gate in enumerate(values.gate.tolist()) if gate > 0.5]
    assert tuple(acting) == placement
    if budget / visual > 0.06:  # below, one reducer with a gate of 0.95 cannot
        objective = Objective(budget, count, visual, ())
        assert tokens_left(objective, values, acting).item() == pytest.approx(budget, rel=1e-3)


@pytest.mark.parametrize("budget", [150, 200, 400, 576])
def test_a_start_meets_a_layer_average(budget: int) -> None:
    values = Theta.from_values(start_values("warm", 8, 576, budget, 3, (0, 2, 4), "layer_average"))()
    objective = Objective(budget, 3, 576, (), budget_measure="layer_average")
    assert tokens_left(objective, values, (0, 2, 4)).item() == pytest.approx(budget, rel=1e-3)
    with pytest.raises(SettingError, match=r"budget=60: reducers at \[0, 2, 4\] leave a layer average of 7\d\.\d"):
        start_values("warm", 8, 576, 60, 3, (0, 2, 4), "layer_average")


def test_the_named_starts() -> None:
    warm = start_values("warm", 32, 576, 64, 3, (2, 6, 15))
    uniform = start_values("uniform", 32, 576, 64, 3, (2, 6, 15))
    columns = {kind: i for i, kind in enumerate(KINDS)}
    assert warm[:, columns["gamma"]].max().item() < 0.05
    assert set(uniform[:, columns["gamma"]].tolist()) == {0.5}
    assert set(uniform[:, columns["tau"]].tolist()) == {0.5}
    for start in (warm, uniform):
        assert set(start[:, columns["theta"]].tolist()) == {0.0}
        assert start[:, columns["rho"]].max().item() < 0.05
        assert [layer for layer in range(32) if start[layer, 0] > 0.5] == [2, 6, 15]


def test_placements_follow_the_depth() -> None:
    assert default_placement(32, 3) == (2, 6, 15)
    assert default_placement(32, 7) == (2, 6, 15)
    assert default_placement(32, 2) == (2, 15)
    assert default_placement(40, 3) == (3, 8, 19)
    assert default_placement(8, 3) == (0, 1, 3)
    with pytest.raises(EosError, match="do not fit"):
        default_placement(3, 3)


@pytest.mark.parametrize("placement", [(), (1, 2, 3, 4), (2, 1), (1, 1), (-1,), (7,)])
def test_impossible_placements_are_refused(placement: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="placement"):
        start_values("warm", 8, 576, 64, 3, placement)
