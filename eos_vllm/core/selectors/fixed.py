"""Choices that look at nothing: what every method has to beat, and the ceiling of speed."""

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import TowerOutput, spread


class Uniform(Selector):
    """Every n-th patch in raster order, from half a step on."""

    rule: Literal["uniform"] = "uniform"

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        return Choice(spread(keep, tower.total, tower.vision.device).expand(tower.images, keep))


class Random(Selector):
    """Random places, the same ones of every image."""

    rule: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        places = _random_places(self.seed, tower.total, keep, tower.vision.device)
        return Choice(places.expand(tower.images, keep))


@lru_cache(maxsize=256)
def _random_places(seed: int, total: int, keep: int, device: torch.device) -> torch.Tensor:
    """Drawn on the host, so that all devices have the same; remembered, for the copy waits for the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:keep].sort().values.to(device)
