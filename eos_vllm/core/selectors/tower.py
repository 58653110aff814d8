"""What a vision tower gives of a batch of images, and the scores and distances that selectors read of it.

All of it is worked out per image: what is cached under an image and a count must not depend on who shared its batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F

# The tower's last layer that runs; others by their own number, from 0.
LAST = -1

Score = Literal["cls_attention", "received_attention", "rarity", "norm", "uniform"]
Features = Literal["projected", "vision"]


@dataclass(frozen=True)
class QueriesAndKeys:
    """Of one tower layer, CLS token first: ``[B, 1 + N, H, D]`` each; H are the heads of this tensor-parallel rank."""

    query: torch.Tensor
    key: torch.Tensor


def _alone(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass
class TowerOutput:
    """A batch of B images of N patches each, in raster order.

    Attributes:
        vision: what goes into the projector ``[B, N, dv]``.
        project: the projector, ``[B, n, dv]`` to ``[B, n, d]``.
        cls: the tower's CLS token where it has one ``[B, dv]``.
        layers: queries and keys of the layers that the selector asked for (:meth:`Selector.reads_layers`).
        join: means over tensor-parallel ranks, each of which holds some heads.
    """

    vision: torch.Tensor
    project: Callable[[torch.Tensor], torch.Tensor]
    cls: torch.Tensor | None = None
    layers: Mapping[int, QueriesAndKeys] = field(default_factory=dict)
    join: Callable[[torch.Tensor], torch.Tensor] = _alone

    @property
    def images(self) -> int:
        return self.vision.shape[0]

    @property
    def total(self) -> int:
        """N, patches of an image."""
        return self.vision.shape[1]

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, for whoever remembers it and counts bytes."""
        seen = [tensor for layer in self.layers.values() for tensor in (layer.query, layer.key)]
        return [self.vision, self.projected, *([] if self.cls is None else [self.cls]), *seen]

    @cached_property
    def projected(self) -> torch.Tensor:
        """All visual tokens as the language model would get them ``[B, N, d]``."""
        return self.project(self.vision)

    def features(self, name: Features) -> torch.Tensor:
        """``[B, N, dv or d]``."""
        return self.projected if name == "projected" else self.vision

    def cosine(self, name: Features) -> torch.Tensor:
        """Cosine of each patch to each ``[B, N, N]``, float32."""
        return cosine(self.features(name), self.features(name))

    def score(self, name: Score, features: Features = "projected") -> torch.Tensor:
        """Saliency of each patch ``[B, N]``, float32.

        ``cls_attention``: of the last layer's CLS query, mean over heads. ``received_attention``: of all patches'
        queries, mean over heads and queries; needs no CLS token. ``rarity``: one minus the cosine to the image's mean
        feature. ``norm``: length of the feature. ``uniform``: 1.
        """
        if name == "cls_attention":
            return self.cls_attention()
        if name == "received_attention":
            return self.received_attention()
        values = self.features(features).float()
        if name == "norm":
            return values.norm(dim=-1)
        if name == "rarity":
            return 1.0 - (F.normalize(values, dim=-1) * F.normalize(values.mean(dim=1, keepdim=True), dim=-1)).sum(-1)
        return values.new_ones(values.shape[:2])

    def cls_attention(self, layer: int = LAST) -> torch.Tensor:
        """Attention of the CLS token to the patches in a layer, mean over heads ``[B, N]``: one row, no matrix."""
        seen = self.layers[layer]
        query, key = seen.query[:, 0].float(), seen.key.float()
        logits = torch.einsum("bhd,bnhd->bhn", query, key) * query.shape[-1] ** -0.5
        return self.join(logits.softmax(dim=-1)[:, :, 1:].mean(dim=1))

    def received_attention(self, layer: int = LAST) -> torch.Tensor:
        """Attention that patches receive from all patches, mean over heads and queries ``[B, N]``."""
        seen = self.layers[layer]
        query, key = (x.float().transpose(1, 2) for x in (seen.query[:, 1:], seen.key))
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
        return self.join(attention[..., 1:].mean(dim=(1, 2)))

    def mean_keys(self, layer: int = LAST) -> torch.Tensor:
        """Keys of the patches, mean over heads ``[B, N, D]``."""
        return self.join(self.layers[layer].key[:, 1:].float().mean(dim=2))


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each row of ``a`` ``[B, n, d]`` to each of ``b`` ``[B, m, d]``: ``[B, n, m]``, float32."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


def rows_of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` ``[B, n]`` of ``values`` ``[B, N, d]``."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def spread(count: int, total: int, device: torch.device) -> torch.Tensor:
    """``count`` places evenly over ``total``, from half a step on ``[count]``; made on the device."""
    return (torch.arange(count, device=device) * 2 + 1) * total // (2 * max(1, count))


def first_max(values: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row ``[..., N]``; of equal ones the lowest, on every device."""
    best = values.amax(dim=-1, keepdim=True)
    index = torch.arange(values.shape[-1], device=values.device)
    found = torch.where(values == best, index, values.shape[-1]).amin(dim=-1)
    return found.clamp_(max=values.shape[-1] - 1)  # nothing equals a NaN, which must spoil one answer and no more


def ascending(chosen: list[torch.Tensor]) -> torch.Tensor:
    """Picks ``[B]`` of each step as ascending indices ``[B, K]``."""
    return torch.stack(chosen, dim=1).sort(dim=1).values
