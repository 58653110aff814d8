"""Choices that look at nothing: what every method has to beat, and the ceiling of speed."""

from typing import Literal

import torch
from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.tower import TowerOutput


class Uniform(Selector):
    """Every n-th patch in raster order, from half a step on."""

    rule: Literal["uniform"] = "uniform"

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        places = (torch.arange(keep) * 2 + 1) * tower.total // (2 * keep)
        return Choice(places.to(tower.vision.device).expand(tower.images, keep))


class Random(Selector):
    """Random places, the same ones of every image."""

    rule: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)

    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """As :meth:`Selector.choose`."""
        places = torch.randperm(tower.total, generator=torch.Generator().manual_seed(self.seed))[:keep].sort().values
        return Choice(places.to(tower.vision.device).expand(tower.images, keep))
