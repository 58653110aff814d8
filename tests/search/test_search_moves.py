"""Moves of reducers to other layers: which there are, which one is taken, and what goes with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from search_cases import LAYERS, kill_at, make_rules, make_settings, make_theta

from eos_search.loop import Trainer
from eos_search.moves import Move, best_gain, carry_out, moved, moves_of
from eos_search.objective import Objective, TaskTerms
from eos_search.run import run_search
from eos_search.structure import acting_of

ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Toy:
    id: str
    offset: float = 0.0


def far_from(layer: int) -> Any:
    """A task that is worse the further the first reducer stands from a layer; nothing of it has a gradient."""

    def task(example: Toy, _values: Any, structure: Any) -> TaskTerms:
        away = abs(structure.acting[0] - layer) if structure.acting else 99
        loss = torch.tensor(away + example.offset, dtype=torch.float64)
        return TaskTerms(loss, ZERO, loss)

    return task


@given(st.sets(st.integers(0, LAYERS - 2), min_size=1, max_size=3))
def test_moves_go_to_free_places(acting: set[int]) -> None:
    found = moves_of(sorted(acting), range(LAYERS - 1))
    assert len(set(found)) == len(found) == len(acting) * (LAYERS - 1 - len(acting))
    for here, there in found:
        assert here in acting
        assert there in range(LAYERS - 1)
        assert there not in acting
    assert moves_of([-1, 0], range(3)) == [Move(0, 1), Move(0, 2)]  # what stands before the decoder stays there


def test_a_move_is_taken_for_more_than_noise() -> None:
    moves = [Move(1, 0), Move(1, 2)]
    losses = torch.tensor([[1.0, 1.0, 1.0], [0.9, 1.2, 0.8], [0.8, 0.7, 0.9]])
    assert best_gain(moves, losses, [0, 0, 0]) == Move(1, 2)
    # A mean gain of 0.03 with a standard error of 0.12.
    assert best_gain(moves[:1], losses[:2], [0, 0]) is None
    # What is no loss of a row counts in full: a dearer place has to be worth it.
    assert best_gain(moves, losses, [0, 0, 0.3]) is None
    assert best_gain(moves, losses, [0.3, 0, 0.3]) == Move(1, 0)
    assert best_gain(moves, losses[:, :1], [0, 0, 0]) is None
    assert best_gain(moves, losses.nan_to_num(0) * torch.nan, [0, 0, 0]) is None
    # Over two processes with the same rows twice as many are there, and the error is smaller.
    close = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    assert best_gain(moves[:1], close, [0, 0]) is None
    assert best_gain(moves[:1], close, [0, 0], lambda sums: 2 * sums) == Move(1, 0)


def test_what_the_optimizer_remembers_goes_along() -> None:
    theta = make_theta({1: 0.5})
    optimizer = torch.optim.AdamW(theta.parameters(), lr=0.1)
    theta.raw.grad = torch.arange(theta.raw.numel(), dtype=torch.float64).view_as(theta.raw)
    optimizer.step()
    raw, state = theta.raw.detach().clone(), {k: v.clone() for k, v in optimizer.state[theta.raw].items()}
    carry_out(Move(1, 4), theta, optimizer)
    for before, now in (
        (raw, theta.raw),
        *((state[k], optimizer.state[theta.raw][k]) for k in ("exp_avg", "exp_avg_sq")),
    ):
        assert torch.equal(now[1], before[4])
        assert torch.equal(now[4], before[1])
        assert torch.equal(now, moved(before, Move(1, 4)))
    assert torch.equal(optimizer.state[theta.raw]["step"], state["step"])


@pytest.mark.parametrize("target", [0, 4])
def test_a_reducer_walks_to_where_the_loss_is_least(tmp_path: Path, target: int) -> None:
    """From the middle to either end at once, though no gradient says so; without moves it stays."""

    def end(every: int) -> tuple[int, ...]:
        settings = make_settings(tmp_path, tmp_path, steps=12, move_every=every, warmup=0.0)
        theta = make_theta({2: 0.5})
        trainer = Trainer(theta, make_rules(), Objective(36, 3, 36, ()), settings, Accelerator())
        for _ in range(3):
            trainer.step([Toy("a"), Toy("b", 0.5)], far_from(target))
        return acting_of(theta(), make_rules())

    assert end(2) == (target,)
    assert end(0) == (2,)


def test_a_place_that_costs_more_than_it_is_worth_is_not_taken(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, tmp_path, steps=12, move_every=1, warmup=0.0, learning_rate=1e-9)
    theta = make_theta({1: 0.9})
    dear = Objective(4, 3, 36, (), budget_measure="layer_average", lambda_budget=10.0)
    trainer = Trainer(theta, make_rules(measure="layer_average"), dear, settings, Accelerator())
    for _ in range(4):
        trainer.step([Toy("a"), Toy("b")], far_from(4))
    assert acting_of(theta(), make_rules()) == (0,)


def test_budgets_that_a_place_cannot_have_keep_reducers_from_it(tmp_path: Path) -> None:
    """Behind layer 2 no layer average below 18 of 36 tokens can be had in six layers."""
    settings = make_settings(tmp_path, tmp_path, steps=12, move_every=1, warmup=0.0, serve_budgets=(14,))
    theta = make_theta({0: 0.5})
    objective = Objective(14, 3, 36, (), budget_measure="layer_average")
    trainer = Trainer(theta, make_rules(measure="layer_average"), objective, settings, Accelerator())
    for _ in range(4):
        trainer.step([Toy("a"), Toy("b")], far_from(4))
    assert acting_of(theta(), make_rules()) == (1,)


def test_a_search_with_moves_goes_on_where_it_was(small_path: Path, tmp_path: Path) -> None:
    moving: dict[str, Any] = {"move_every": 1, "batch_size": 4, "learning_rate": 0.3}
    whole = run_search(make_settings(small_path, tmp_path / "whole", **moving), quiet=True)
    assert len({tuple(record["acting"]) for record in whole.records}) > 1
    settings = make_settings(small_path, tmp_path / "run", **moving)
    kill_at(3, settings)
    assert run_search(settings, resume=True, quiet=True).records == whole.records
    assert (tmp_path / "run/theta.json").read_bytes() == whole.path.read_bytes()
