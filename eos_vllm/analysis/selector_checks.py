"""Holds the selectors in front of the language model against :mod:`eos_vllm.analysis.plain_selectors`.

Two choices can be told apart from rounding only where both are computed without any: :func:`exact_tower` makes features
whose cosines, gains and values are exact in float32, ties included. The scores themselves, which are not, are held
against plain ones of their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from eos_vllm.analysis.equivalence import Check
from eos_vllm.analysis.plain_selectors import PLAIN, Array, Image, attention, mean_over_heads
from eos_vllm.core.selectors import LAST, SELECTORS, QueriesAndKeys, TowerOutput

PATCHES = 576
COUNTS = (16, 64, 192)
# Float32 sums of some hundred terms against float64, relative to the largest value.
ROUNDING = 5e-6
_HEADS, _WIDTH = 4, 16
# Square numbers that are powers of two: vectors of so many signs have a length without rounding.
_VISION, _PROJECTED = 64, 16


@dataclass
class GivenAttention(TowerOutput):
    """A tower whose attention is given ``[B, N]`` each, where that of queries and keys would have to be rounded."""

    given: dict[str, torch.Tensor] = field(default_factory=dict)

    def cls_attention(self, layer: int = LAST) -> torch.Tensor:
        """As :meth:`TowerOutput.cls_attention`."""
        return self.given["cls_attention" if layer == LAST else "shallow_attention"]

    def received_attention(self, layer: int = LAST) -> torch.Tensor:
        """As :meth:`TowerOutput.received_attention`."""
        return self.given["received_attention"]

    def image(self, index: int) -> Image:
        """The plain form of one image of the batch."""
        given = {name: _plain(values[index]) for name, values in self.given.items()}
        vision, projected, keys = self.vision[index], self.projected[index], self.layers[LAST].key[index, 1:]
        assert self.cls is not None
        return Image(
            vision=_plain(vision), projected=_plain(projected), cls=_plain(self.cls[index]), keys=_plain(keys), **given
        )


def exact_tower(seed: int, batch: int, patches: int, levels: int = 256, twins: int = 0) -> GivenAttention:
    """Images on which float32 and float64 choose alike: vectors of signs times powers of two, and scores in steps.

    Args:
        seed: of the random numbers.
        batch: B.
        patches: N of each image.
        levels: steps of the scores between 0 and 1, a power of two up to 256; few of them make ties.
        twins: patches that are given the features and keys of others, at most half of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> torch.Tensor:
        values = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        return values * 2.0 ** torch.randint(-2, 3, (*shape[:-1], 1), generator=generator)

    def scores() -> torch.Tensor:
        values = torch.randint(0, levels + 1, (batch, patches), generator=generator) / levels
        # With 0 and 1 among them, scaling to that range is exact too.
        ends = torch.rand(batch, patches, generator=generator).argsort(dim=1)
        return values.scatter(1, ends[:, :1], 0.0).scatter(1, ends[:, 1:2], 1.0)

    copied = torch.arange(patches).repeat(batch, 1)
    for row in copied:
        places = torch.randperm(patches, generator=generator)
        row[places[:twins]] = places[twins : 2 * twins]
    images = torch.arange(batch).unsqueeze(1)
    vision, projected, key = (signs(batch, patches, width)[images, copied] for width in (_VISION, _PROJECTED, _WIDTH))
    # Heads differ by what their mean does not show.
    apart = torch.randint(-8, 9, (batch, patches, _HEADS // 2, _WIDTH), generator=generator).float()
    heads = torch.cat([key.unsqueeze(2) + apart, key.unsqueeze(2) - apart], dim=2)
    layer = torch.cat([torch.zeros_like(heads[:, :1]), heads], dim=1)
    return GivenAttention(
        vision=vision,
        project=lambda _: projected,
        cls=signs(batch, _VISION),
        layers={LAST: QueriesAndKeys(layer, layer)},
        given={
            "cls_attention": scores(),
            "shallow_attention": scores(),
            "received_attention": (scores() + 1.0) / 4.0,
        },
    )


def selector_checks(seed: int, patches: int = PATCHES, counts: Iterable[int] = COUNTS) -> list[Check]:
    """Holds each rule, with its default fields, against its plain version, and the scores that rules read.

    Returns:
        For each rule the number of kept patches that differ, bound 0; for those that mix features also the largest
        difference of the tokens relative to the largest token, as for the scores.
    """
    tower = exact_tower(seed, 1, patches, twins=patches // 16)
    image = tower.image(0)
    checks = _score_checks(seed, patches)
    for rule, plain in PLAIN.items():
        differing: dict[int, int] = {}
        rounding = []
        for count in counts:
            choice = SELECTORS[rule]().choose(tower, count)
            kept, tokens = plain(image, count)
            real = choice.kept[0].tolist()
            differing[count] = 0 if real == kept else max(1, len(set(kept) ^ set(real)))
            if tokens is not None:
                assert choice.features is not None
                rounding.append(_relative(choice.features[0], tokens))
        note = ", ".join(f"K {count}: {number} patches" for count, number in differing.items() if number)
        checks.append(Check(rule, float(sum(differing.values())), 0.0, note))
        if rounding:
            checks.append(Check(f"{rule} tokens", max(rounding), ROUNDING))
    return checks


def _score_checks(seed: int, patches: int) -> list[Check]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 1 + patches, _HEADS, _WIDTH, generator=generator) for _ in range(2))
    vision = torch.randn(1, patches, _VISION, generator=generator)
    tower = TowerOutput(vision=vision, project=lambda values: values, layers={LAST: QueriesAndKeys(query, key)})
    shares = attention(_plain(query[0]), _plain(key[0]))
    expected = {
        "cls_attention": (tower.cls_attention(), shares[0, 1:]),
        "received_attention": (tower.received_attention(), shares[1:, 1:].mean(axis=0)),
        "mean_keys": (tower.mean_keys(), mean_over_heads(_plain(key[0, 1:]))),
    }
    return [Check(name, _relative(real[0], plain), ROUNDING) for name, (real, plain) in expected.items()]


def _relative(real: torch.Tensor, plain: Array) -> float:
    return float(np.abs(_plain(real) - plain).max() / np.abs(plain).max())


def _plain(values: torch.Tensor) -> Array:
    return values.double().numpy()
