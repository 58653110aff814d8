"""Traces of families with images of any size: kept indices by their own Hugging Face models, places by their layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eos_vllm.core.profile import parse_profile
from eos_vllm.serving.trace_document import ImageTrace
from support.engines import engine, marker_of
from support.families.asks import family_asks
from support.families.build import DEPTH, FAMILIES, Family, write
from support.families.counts import expected_counts
from support.families.prompts import HfModel, Prompt
from support.families.reference import Reference
from support.traces import answer_traced

PRUNE = {"gate": 1.0, "discard": 0.5, "gamma": 0.0, "tau": 0.5, "theta": 0.0, "rho": 0.0, "nu": 0.0}
MIX = {"gate": 1.0, "discard": 0.4, "gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
REDUCERS: dict[str, list[dict[str, Any]]] = {
    "inside": [{"layer": 0, **MIX}, {"layer": 3, **PRUNE}],
    "before": [{"layer": -1, "select": {"rule": "maxmin"}, **PRUNE}],
}
# The small copy of LLaVA-NeXT's image: 8 by 8.
COPY = 64


def profile_of(family: Family, name: str) -> dict[str, Any]:
    return {
        "schema": "eos-profile/2",
        "name": name,
        "model": {
            "architecture": family.architecture,
            "num_decoder_layers": DEPTH,
            "visual_tokens": family.visual_tokens,
        },
        "importance": {"queries": "last_text", "window": "turn"},
        "operator": {"gate_sharpness": 8.0, "norm": "token"},
        "reducers": REDUCERS[name],
        "budget": {"measure": "final", "share": 0.25, "minimum": 1},
    }


def hold_places(image: ImageTrace, picture: Image.Image, newlines: tuple[int, ...], selects: bool) -> None:
    """Tokens stand where the family's layout puts them on the uploaded image; ends of rows stand nowhere."""
    if image.boxes is None:
        assert image.rows is not None
        assert image.columns is not None
        assert image.rows * image.columns == image.tokens
        assert not newlines
        if image.rows != image.columns:
            assert image.columns / image.rows == pytest.approx(picture.width / picture.height, rel=0.35)
        return
    assert (image.rows, image.columns) == (None, None)
    assert len(image.boxes) == image.tokens
    nowhere = [place for place, box in enumerate(image.boxes) if box is None]
    assert nowhere == (list(newlines) if selects else [])
    boxes = [box for box in image.boxes if box is not None]
    small, grid = boxes[:COPY], boxes[COPY:]
    for part in (small, grid):  # each covers the whole image, without gap or overlap
        assert sum((right - left) * (low - top) for left, top, right, low in part) == pytest.approx(1)
        assert len({box[:2] for box in part}) == len(part)
        assert min(min(box) for box in part) == 0
        assert max(max(box) for box in part) == 1
    rows, columns = len({box[1] for box in grid}), len({box[0] for box in grid})
    assert rows == len(newlines)
    # A patch of the grid is a square of the image, but for the model's rounding to whole patches.
    shape = picture.width / picture.height
    assert min(abs(rows - columns / shape), abs(columns - rows * shape)) <= 1


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("which", ["llava-llama", "llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl"])
def test_kept_and_places(which: str, name: str, tmp_path: Path) -> None:
    family, selects = FAMILIES[which], name == "before"
    profile = profile_of(family, name)
    asks = [replace(ask, max_tokens=2) for ask in family_asks(which, 12) if ask.images][:7]
    directory = write(which, tmp_path / which)
    hf = HfModel(directory, family.chat.image)
    steps = {"max_num_batched_tokens": 640 if family.mrope else 1536}
    with engine(directory, parse_profile(profile), page=True, limit_mm_per_prompt=family.image_limits, **steps) as llm:
        found = answer_traced(llm, asks)
        reference = Reference(hf, profile, marker_of(llm))
    reduced = 0
    for ask, (_, trace) in zip(asks, found, strict=True):
        prompt = hf.embed(ask.prompt, ask.images)
        text = [() if selects else rows for rows in prompt.newlines]
        kept = reference.generate(prompt, counts_of(profile, prompt, text), 1).kept
        for i, image in enumerate(trace.images):
            start, end = prompt.spans[i]
            assert image.tokens == end - start - len(text[i])
            visual = [row for row in range(end - start) if row not in text[i]]
            for r, reducer in enumerate(image.reducers):
                assert [visual[place] for place in reducer.kept] == kept[r][i], (ask.prompt, i, r)
                reduced += len(reducer.kept) < len(reducer.entered)
            assert len(image.reducers) == len(profile["reducers"])
            assert image.cropped is (which == "llava-llama")
            hold_places(image, ask.images[i], prompt.newlines[i], selects)
    assert reduced >= 5


def counts_of(profile: dict[str, Any], prompt: Prompt, text: list[tuple[int, ...]]) -> list[list[int]]:
    """Visual tokens of each image left by each reducer, by the documented rule."""
    counts = []
    for (start, end), places in zip(prompt.spans, text, strict=True):
        is_last = end == len(prompt.tokens.ids) and end - start - 1 not in places
        share = profile["budget"]["share"]
        counts.append(expected_counts(profile, share, end - start - len(places), len(places), is_last))
    return counts


def test_a_row_of_pictures_that_nobody_reduces_has_places_too() -> None:
    """Guards :func:`hold_places` against accepting anything."""
    image = ImageTrace(tokens=2, rows=1, columns=3, cropped=False, boxes=None, reused=False, reducers=[])
    with pytest.raises(AssertionError):
        hold_places(image, Image.new("RGB", (2, 1)), (), selects=False)
