"""Rows, points Theta and settings for the tests of the search."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eos_search.examples import Encoder, Prepared, Row, prepare
from eos_search.loop import Trainer
from eos_search.run import run_search
from eos_search.settings import SearchSettings, read_settings
from eos_search.structure import Rules
from eos_search.theta import KINDS, Theta
from eos_vllm.core.profile import ImportanceSpec, ModelSpec, OperatorSpec
from eos_vllm.models.images import sample_image
from support.interruptions import before_call, broken_off

LAYERS, VISUAL = 6, 36
PROMPT, ANSWER = "USER: <image>\n{question} ASSISTANT:", " {answer}"


@dataclass(frozen=True)
class MadeImages:
    """Made-up images, by seed."""

    seeds: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, self.seeds))

    def problem(self) -> str | None:
        return None

    def load(self) -> list[Image.Image]:
        return [sample_image(seed, 24) for seed in self.seeds]


def make_row(seed: int = 0, images: int = 1, answer: str = "yes") -> Row:
    """A row with made-up images."""
    seeds = tuple(10 * seed + i for i in range(images))
    return Row(f"row-{seed}", f"Is there a red circle? Number {seed}.", answer, MadeImages(seeds), "made up")


def make_rules(queries: Any = "relevant_text", norm: Any = "token", max_reducers: int = 3, **changes: Any) -> Rules:
    """Rules for the small model."""
    model = ModelSpec(
        architecture="LlavaForConditionalGeneration",
        num_decoder_layers=changes.pop("depth", LAYERS),
        visual_tokens=changes.pop("visual", VISUAL),
    )
    return Rules(model, ImportanceSpec(queries=queries), OperatorSpec(norm=norm), max_reducers, **changes)


def make_theta(acting: dict[int, float], depth: int = LAYERS, **values: float) -> Theta:
    """Theta with gates 0.9 and the given discards at some layers, gates 0.1 elsewhere; ``values`` hold for all.

    Layer -1 among ``acting`` makes a reducer before the decoder.
    """
    row = {"gate": 0.1, "discard": 0.4, "gamma": 0.3, "tau": 0.3, "theta": 0.1, "rho": 0.4, "nu": 0.3} | values
    before = -1 in acting
    table = torch.tensor([[row[kind] for kind in KINDS]] * (depth + before), dtype=torch.float64)
    for layer, discard in acting.items():
        table[layer, :2] = torch.tensor([0.9, discard])
    return Theta.from_values(table, before=before)


def make_example(small: tuple[Any, Any], row: Row, rules: Rules) -> Prepared:
    """What enters layer 0 for a row."""
    model, processor = small
    encoder = Encoder(processor, PROMPT, ANSWER, VISUAL, 4096)
    encoded = encoder.encode(0, row)
    return prepare(model, encoded, rules.importance.queries, VISUAL, rules.select)  # type: ignore[arg-type]


def make_settings(model: Path, output: Path, /, **changes: Any) -> SearchSettings:
    """A search of few steps on the small model."""
    config: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "data_format": "cluttervqa",
        "samples": 10,
        "budget": 6,
        "placement": (1, 2, 4),
        "align_layers": (2, 4),
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 0.05,
        "log_every": 2,
        "checkpoint_every": 2,
    }
    return read_settings(config | changes)


def _at(step: int) -> Callable[..., bool]:
    return lambda trainer, *_, **__: trainer.scheduler.last_epoch == step


def before_step(step: int, action: Callable[[], object]) -> AbstractContextManager[None]:
    """Does ``action`` in front of this step of a search, counted from 0."""
    return before_call(Trainer, "step", _at(step), action)


def kill_at(step: int, settings: SearchSettings) -> None:
    """Runs a search up to this step, counted from 0, where it is killed: no checkpoint is written for that."""
    with broken_off(Trainer, "step", _at(step), RuntimeError("killed")):
        run_search(settings, quiet=True)
