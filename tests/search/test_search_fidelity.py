"""Table 5 against Table 6 on LLaVA-1.5-7B's Theta: what the two committed configs can move within their steps.

The toy's loss is the distance of Theta's values to Table 6's: a slope that never changes its sign before it is there,
which is the most that an optimiser can be given.
"""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from eos_search.loop import Trainer
from eos_search.objective import Objective, TaskTerms
from eos_search.settings import SearchSettings, read_config, read_settings
from eos_search.space import search_space
from eos_search.structure import Structure
from eos_search.theta import KINDS, Kind, Theta, ThetaValues
from eos_vllm.core.profile import ModelSpec
from eos_vllm.profiles import load

PAPER, OURS = "llava-1.5-7b-paper", "llava-1.5-7b"
PLACES = [3, 6, 16]
# Printed as 0.000.
ZERO = 0.0005
SPEC = ModelSpec(architecture="LlavaForConditionalGeneration", num_decoder_layers=32, visual_tokens=576)


def settings_of(name: str) -> SearchSettings:
    """A committed config."""
    return read_settings(read_config(name))


def start_of(name: str) -> Theta:
    """Where the search of a committed config starts."""
    return search_space(settings_of(name), SPEC)[2]


def targets() -> dict[tuple[int, Kind], float]:
    """Table 6 by layer and kind; gates and discards, which it lacks, are those of the shipped profile."""
    found: dict[tuple[int, Kind], float] = {(layer, "gate"): 0.0 for layer in range(31)}
    kinds: tuple[Kind, ...] = ("gate", "discard", "gamma", "rho", "nu")
    for reducer in load("eos-llava-1.5-7b").reducers:
        found |= {(reducer.layer, kind): getattr(reducer, kind) for kind in kinds}
        if reducer.gamma:  # tau and theta do nothing where nothing is transferred
            found |= {(reducer.layer, kind): getattr(reducer, kind) for kind in ("tau", "theta")}
    return found


def end_of(name: str) -> tuple[dict[tuple[int, Kind], float], float]:
    """Values after a toy run with a committed config, and the sum of its learning rates."""
    settings, wanted = settings_of(name), targets()
    _, rules, theta = search_space(settings, SPEC)
    trainer = Trainer(theta, rules, Objective(576, 31, 576, ()), settings, Accelerator(cpu=True))
    rows, columns = [layer for layer, _ in wanted], [KINDS.index(kind) for _, kind in wanted]
    goal = torch.tensor(list(wanted.values()), dtype=torch.float64)

    def task(example: Example, values: ThetaValues, structure: Structure) -> TaskTerms:
        distance = (values.table[rows, columns] - goal).abs().sum()
        return TaskTerms(distance.new_zeros(()), distance, distance)

    rates = [trainer.step([Example()], task).terms["learning_rate"] for _ in range(settings.steps)]
    table = theta().table.tolist()
    return {place: table[place[0]][KINDS.index(place[1])] for place in wanted}, sum(rates)


class Example:
    """Stands for a row of data."""

    id = "toy"


@pytest.fixture(autouse=True)
def _without_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy reads values only; what they mean as a hard reduction takes most of a step."""
    monkeypatch.setattr("eos_search.loop.read_structure", lambda *_: Structure((), (), None, {}))


def check_structure(end: dict[tuple[int, Kind], float]) -> None:
    """Gates and discards are Table 6's."""
    assert [layer for layer in range(31) if end[layer, "gate"] > 0.9] == PLACES
    assert all(end[layer, "gate"] < 0.1 for layer in range(31) if layer not in PLACES)
    assert [end[layer, "discard"] for layer in PLACES] == pytest.approx([0.55, 0.5, 0.45], abs=0.02)


def test_the_papers_config_cannot_reach_table_6() -> None:
    end, moved = end_of(PAPER)
    # 5 % of 4,000 steps warm up to 1e-3, a cosine goes down from there: half of each.
    assert moved == pytest.approx(2.0, abs=1e-6)
    gamma = start_of(PAPER)().column("gamma")
    assert gamma.tolist() == pytest.approx([0.5] * 32)
    least = 1 / (1 + math.exp(moved))
    assert least == pytest.approx(0.119, abs=1e-3)
    assert min(end[layer, "gamma"] for layer in PLACES) > least
    assert min(end[layer, kind] for layer in PLACES for kind in ("rho", "nu")) > ZERO
    check_structure(end)


def test_our_config_reaches_table_6() -> None:
    end, moved = end_of(OURS)
    assert moved == pytest.approx(100, abs=1e-4)
    check_structure(end)
    assert end[6, "gamma"] == pytest.approx(0.083, abs=1e-3)
    assert end[6, "tau"] == pytest.approx(0.22, abs=5e-3)
    assert end[6, "theta"] == pytest.approx(0.1, abs=5e-3)
    assert max(end[layer, "gamma"] for layer in (3, 16)) < ZERO
    assert max(end[layer, kind] for layer in PLACES for kind in ("rho", "nu")) < ZERO


def test_distances_are_those_of_the_documentation() -> None:
    start = start_of(PAPER)
    gamma = start.raw[6, KINDS.index("gamma")].item()
    assert [gamma - math.log(value / (1 - value)) for value in (0.083, ZERO)] == pytest.approx([2.40, 7.60], abs=5e-3)
    gates = start.raw[:, KINDS.index("gate")]
    shut, open_ = (math.log(value / (1 - value)) / 5 for value in (0.05, 0.95))
    assert open_ - gates[3].item() == pytest.approx(1.63, abs=5e-3)
    assert gates[2].item() - shut == pytest.approx(1.18, abs=5e-3)
    discard = start.raw[2, KINDS.index("discard")]
    assert torch.sigmoid(discard + torch.tensor([-2.0, 2.0])).tolist() == pytest.approx([0.14, 0.90], abs=5e-3)


def test_table_5_is_in_the_papers_config() -> None:
    paper, ours = settings_of(PAPER), settings_of(OURS)
    table_5 = ("learning_rate", "weight_decay", "clip", "batch_size", "steps", "warmup", "seed", "lambda_align")
    assert [getattr(paper, name) for name in table_5] == [1e-3, 0, 1.0, 4, 4000, 0.05, 42, 0.1]
    assert (paper.dtype, paper.start) == ("bfloat16", "uniform")
    assert (paper.placement, paper.max_reducers, paper.align_layers) == ((2, 6, 15), 3, (4, 8, 12, 16, 20, 24, 28))
    assert paper.samples == 50_000
    # docs/search.md has the reason of each.
    assert set(ours.differences(paper)) == {"name", "learning_rate", "gate_rate", "budget_gates", "keep_estimator"}
    for settings in (paper, ours):
        assert settings.output == Path("runs") / (PAPER if settings is paper else OURS)
