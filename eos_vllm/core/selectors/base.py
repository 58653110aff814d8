"""What all selectors are: their fields are the profile's ``select``, :meth:`Selector.choose` is the method."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from eos_vllm.core.selectors.tower import LAST, Score, TowerOutput


@dataclass(frozen=True)
class Choice:
    """What a selector makes of a batch of images.

    Attributes:
        kept: patches chosen, ``[B, K]`` ascending.
        features: in place of the tower's features of these ``[B, K, dv]``, where the method mixes them itself; the
            unified operator has then nothing to do.
    """

    kept: torch.Tensor
    features: torch.Tensor | None = None


class Selector(BaseModel):
    """One rule that chooses K of an image's N patches before the language model; it never sees the question."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    rule: str = ""

    # Whether the method mixes features itself, so that a profile may ask the operator for nothing else.
    mixes: ClassVar[bool] = False
    # Whether the tower needs a CLS token beyond what the score needs.
    reads_cls: ClassVar[bool] = False

    @abstractmethod
    def choose(self, tower: TowerOutput, keep: int) -> Choice:
        """Chooses ``keep`` of the patches, fewer than there are, of every image.

        Nothing is read back from the device, and no image's choice depends on the others.
        """

    def saliency(self, tower: TowerOutput) -> torch.Tensor:
        """Scores of all patches ``[B, N]`` by which the operator reweights (``rho``): the rule's own, else 1."""
        return tower.score(self.score_name)

    @property
    def score_name(self) -> Score:
        """The score that the rule reads."""
        return getattr(self, "score", "uniform")

    @property
    def needs_cls(self) -> bool:
        """Whether the tower must have a CLS token."""
        return self.reads_cls or self.score_name == "cls_attention"

    def reads_layers(self) -> tuple[int, ...]:
        """Tower layers whose queries and keys the rule reads."""
        return (LAST,) if self.score_name in ("cls_attention", "received_attention") else ()

    def count(self, keep: int, total: int) -> int:
        """How many tokens the rule gives where ``keep`` of ``total`` are asked for; never more."""
        return keep
