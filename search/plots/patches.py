"""Which patches of an image a profile keeps at each reducer, drawn over the image as the model sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from eos_search.plots.canvas import blank, panels
from eos_search.reference import ReferenceModel
from eos_vllm.core.budget import own_budget, tokens_of
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

_DIMMED = 0.2
_WHITE = 255.0


@dataclass(frozen=True)
class Kept:
    """Kept patches of an image.

    Attributes:
        picture: the image after the model's own resizing and cropping, RGB ``[height, width, 3]`` uint8.
        side: patches on a side.
        layers: decoder layers behind which tokens are reduced.
        by_budget: for each budget the indices of the patches left after each reducer, ascending, row by row.
    """

    picture: np.ndarray
    side: int
    layers: tuple[int, ...]
    by_budget: Mapping[int, tuple[tuple[int, ...], ...]]


def kept_patches(
    model: Any, processor: Any, profile: Profile, prompt: str, image: Image.Image, budgets: Sequence[int | None]
) -> Kept:
    """Runs the reference over a prompt with one image, once for each budget.

    Args:
        model: a Hugging Face LLaVA.
        processor: its processor.
        profile: who chooses.
        prompt: with one ``<image>``.
        image: the image.
        budgets: retain budgets; None for the profile's own.

    Raises:
        EosError: the visual tokens are no square grid.
        BudgetError: a budget that cannot be.
    """
    reference = ReferenceModel(model, processor, profile)
    embeddings, spans, _ = reference.embed(prompt, [image])
    (span,) = spans
    side = round(span.length**0.5)
    if side * side != span.length:
        raise EosError("image", span.length, "visual tokens are no square grid", "this model's patches can't be drawn")
    found = {}
    for budget in budgets:
        state = reference.prefill(embeddings, spans, budget)
        # A plan that keeps all has no reducers to tell of.
        kept = state.kept or [torch.arange(span.end)] * len(profile.reducers)
        own = round(tokens_of(own_budget(profile), span.length)) if budget is None else budget
        found[own] = tuple(
            tuple(position - span.start for position in positions.tolist() if span.start <= position < span.end)
            for positions in kept
        )
    return Kept(seen_picture(processor, image), side, profile.layers, found)


def seen_picture(processor: Any, image: Image.Image) -> np.ndarray:
    """The image after resizing and cropping, before normalisation: RGB ``[height, width, 3]`` uint8."""
    maker = processor.image_processor
    pixels = maker(images=[image], return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    restored = pixels * np.array(maker.image_std) + np.array(maker.image_mean)
    return np.clip(restored * _WHITE + 0.5, 0, _WHITE).astype(np.uint8)


def shade(picture: np.ndarray, side: int, kept: Sequence[int]) -> np.ndarray:
    """The picture with the patches that are gone turned nearly white.

    Args:
        picture: RGB ``[height, width, 3]`` uint8.
        side: patches on a side.
        kept: indices of kept patches, row by row.
    """
    height, width = picture.shape[:2]
    mask = np.zeros(side * side, bool)
    mask[list(kept)] = True
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    seen = mask.reshape(side, side)[rows[:, None], columns[None, :], None]
    dimmed = _DIMMED * picture + (1 - _DIMMED) * _WHITE
    return np.where(seen, picture, dimmed).astype(np.uint8)


def patches_figure(kept: Kept, profile: str, question: str) -> tuple[Figure, dict[str, Any]]:
    """A row for each budget: the image, and what is left of it after each reducer.

    Returns:
        The figure, and its data: indices of the kept patches.
    """
    rows, columns = len(kept.by_budget), 1 + len(kept.layers)
    figure, axes = panels(rows, columns, width=2.3, height=2.5)
    blank(axes)
    total = kept.side**2
    for row, (budget, steps) in enumerate(kept.by_budget.items()):
        axes[row * columns].imshow(kept.picture)
        axes[row * columns].set_title(f"retain {budget}: {total} tokens")
        for step, (layer, indices) in enumerate(zip(kept.layers, steps, strict=True), start=1):
            axis = axes[row * columns + step]
            axis.imshow(shade(kept.picture, kept.side, indices))
            axis.set_title(f"after layer {layer}: {len(indices)}")
    figure.suptitle(f"{profile}: {question}".replace("\n", " "))
    data = {
        "figure": "patches",
        "profile": profile,
        "question": question,
        "side": kept.side,
        "layers": list(kept.layers),
        "kept": {str(budget): [list(indices) for indices in steps] for budget, steps in kept.by_budget.items()},
    }
    return figure, data
