"""Selectors in front of the language model against plain loops in float64 (``eos_vllm.analysis.plain_selectors``)."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import output
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from eos_vllm.analysis import plain_selectors, selector_checks
from eos_vllm.analysis.plain_selectors import PLAIN, Image, attention, mean_over_heads
from eos_vllm.analysis.selector_checks import GivenAttention, exact_tower
from eos_vllm.cli import verify
from eos_vllm.core.selectors import LAST, SELECTORS, AnySelector, QueriesAndKeys, Selector, TowerOutput
from support.margins import MARGIN, record_margins

CHOOSING = sorted(set(SELECTORS) - {"resize"})
SHALLOW = 5
# Fields away from their defaults, all of them exact on the towers of exact_tower.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"score": "received_attention"}],
    "maxmin": [{"features": "vision"}],
    "coverage": [{"alpha": 0.0, "features": "projected"}, {"score": "received_attention"}],
    "mmr": [{"trade": 0.25, "features": "vision"}, {"trade": 1.0, "score": "cls_attention"}, {"trade": 0.0}],
    "visprune": [{"share": 0.0, "features": "projected"}, {"share": 1.0}, {"share": 0.75}],
    "window_topk": [{"window": 3}, {"window": 2}],
    "visionzip": [{"contextual": 0.0}, {"contextual": 0.5}, {"contextual": 0.96}],
}

sides = st.sampled_from([4, 5, 6, 8, 12])
seeds = st.integers(0, 2**20)


def check(selector: Selector, tower: TowerOutput, image: Image, index: int, count: int) -> None:
    """One image of a batch against its plain version, with the selector's fields."""
    fields = selector.model_dump(exclude={"rule", "shallow_layer"})
    kept, tokens = PLAIN[selector.rule](image, count, **fields)
    choice = selector.choose(tower, count)
    assert choice.kept[index].tolist() == kept
    assert (choice.features is None) is (tokens is None)
    if tokens is not None:
        assert choice.features[index].shape == (count, tower.vision.shape[2])
        np.testing.assert_allclose(choice.features[index], tokens, rtol=1e-4, atol=1e-5 * np.abs(tokens).max())


@pytest.mark.parametrize("rule", PLAIN)
@settings(max_examples=50)
@given(
    side=sides,
    batch=st.integers(1, 3),
    levels=st.sampled_from([2, 16, 256]),
    twins=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_a_rule_equals_its_plain_version_ties_included(
    rule: str, side: int, batch: int, levels: int, twins: bool, seed: int, data: st.DataObject
) -> None:
    tower = exact_tower(seed, batch, side * side, levels, twins=side if twins else 0)
    count = data.draw(st.one_of(st.integers(1, 6), st.integers(1, side * side - 1)), label="count")
    selector = SELECTORS[rule](**data.draw(st.sampled_from([{}, *FIELDS.get(rule, [])]), label="fields"))
    index = data.draw(st.integers(0, batch - 1), label="image")
    check(selector, tower, tower.image(index), index, count)


def random_tower(seed: int, batch: int, patches: int) -> TowerOutput:
    """Normal features, queries and keys; the projector is no multiple of a rotation."""
    g = torch.Generator().manual_seed(seed)
    projector = torch.randn(24, 16, generator=g)
    layers = {
        layer: QueriesAndKeys(*(torch.randn(batch, 1 + patches, 3, 8, generator=g) for _ in range(2)))
        for layer in (LAST, SHALLOW)
    }
    vision, cls = torch.randn(batch, patches, 24, generator=g), torch.randn(batch, 24, generator=g)
    return TowerOutput(vision=vision, project=lambda values: values @ projector, cls=cls, layers=layers)


def image_of(tower: TowerOutput, index: int) -> Image:
    """The plain form of one image, attention worked out in float64."""

    def plain(values: torch.Tensor) -> plain_selectors.Array:
        return values[index].double().numpy()

    shares = {layer: attention(plain(seen.query), plain(seen.key)) for layer, seen in tower.layers.items()}
    assert tower.cls is not None
    return Image(
        vision=plain(tower.vision),
        projected=plain(tower.projected),
        cls=plain(tower.cls),
        cls_attention=shares[LAST][0, 1:],
        shallow_attention=shares[SHALLOW][0, 1:],
        received_attention=shares[LAST][1:, 1:].mean(axis=0),
        keys=plain(tower.layers[LAST].key)[1:],
    )


@pytest.mark.parametrize("rule", PLAIN)
@settings(max_examples=30)
@given(side=st.integers(4, 7), batch=st.integers(1, 3), seed=seeds, data=st.data())
def test_a_rule_equals_its_plain_version_on_attention_of_a_tower(
    rule: str, side: int, batch: int, seed: int, data: st.DataObject
) -> None:
    tower = random_tower(seed, batch, side * side)
    count = data.draw(st.integers(1, side * side - 1), label="count")
    image = image_of(tower, batch - 1)
    with pytest.MonkeyPatch.context() as patch:
        margins = record_margins(patch)
        PLAIN[rule](image, count)
    assume(min(margins) > MARGIN)
    check(SELECTORS[rule](), tower, image, batch - 1, count)


@given(side=st.integers(2, 6), batch=st.integers(1, 3), seed=seeds)
@settings(max_examples=20)
def test_scores_equal_plain_ones(side: int, batch: int, seed: int) -> None:
    tower = random_tower(seed, batch, side * side)
    image = image_of(tower, batch - 1)
    mean = image.projected.mean(axis=0)
    lengths = np.array([math.sqrt(row @ row) for row in image.projected])
    expected = {
        "cls_attention": image.cls_attention,
        "received_attention": image.received_attention,
        "norm": lengths,
        "rarity": 1.0 - image.projected @ mean / (lengths * math.sqrt(mean @ mean)),
        "uniform": np.ones(side * side),
    }
    for name, scores in expected.items():
        np.testing.assert_allclose(tower.score(name)[batch - 1], scores, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(tower.cls_attention(SHALLOW)[batch - 1], image.shallow_attention, rtol=1e-4)
    np.testing.assert_allclose(tower.mean_keys()[batch - 1], mean_over_heads(image.keys), rtol=1e-4, atol=1e-5)


def one_of(tower: GivenAttention, index: int) -> GivenAttention:
    """The tower's output of one image of the batch."""
    cut = slice(index, index + 1)
    layers = {layer: QueriesAndKeys(seen.query[cut], seen.key[cut]) for layer, seen in tower.layers.items()}
    given_scores = {name: values[cut] for name, values in tower.given.items()}
    vision, projected, cls = tower.vision[cut], tower.projected[cut], tower.cls[cut]
    return GivenAttention(vision=vision, project=lambda _: projected, cls=cls, layers=layers, given=given_scores)


@pytest.mark.parametrize("rule", CHOOSING)
@settings(max_examples=10)
@given(side=sides, seed=seeds, data=st.data())
def test_a_choice_is_ascending_and_does_not_depend_on_the_batch(
    rule: str, side: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, side * side - 1), label="count")
    selector = SELECTORS[rule]()
    together = exact_tower(seed, 3, side * side, levels=16, twins=2)
    choice = selector.choose(together, count)
    patches = max(1, count - 1) if rule == "prumerge_plus" else count - 1 if rule == "visionzip" else count
    assert choice.kept.shape == (3, patches)
    assert choice.kept.dtype == torch.int64
    assert all(sorted(set(row)) == row and set(row) <= set(range(side * side)) for row in choice.kept.tolist())
    for index in range(3):
        alone = selector.choose(one_of(together, index), count)
        assert torch.equal(alone.kept[0], choice.kept[index])
        if choice.features is not None:
            torch.testing.assert_close(alone.features[0], choice.features[index], rtol=1e-5, atol=1e-5)


def test_random_places_follow_from_the_seed_alone() -> None:
    one, other = (exact_tower(seed, 3, 64) for seed in (0, 1))
    places = [SELECTORS["random"](seed=seed).choose(tower, 20).kept for seed in (0, 1) for tower in (one, other)]
    assert torch.equal(places[0], places[1])
    assert (places[0] == places[0][0]).all()
    assert not torch.equal(places[0], places[2])


def test_resize_gives_the_largest_square() -> None:
    resize = SELECTORS["resize"]()
    given_counts = {1: 1, 3: 1, 4: 4, 64: 64, 80: 64, 192: 169, 575: 529, 576: 576, 600: 600}
    assert {keep: resize.count(keep, 576) for keep in given_counts} == given_counts
    assert all(SELECTORS[rule]().count(80, 576) == 80 for rule in CHOOSING)
    with pytest.raises(RuntimeError, match="in front of the tower"):
        resize.choose(exact_tower(0, 1, 16), 4)


@pytest.mark.parametrize(
    ("select", "layers", "cls"),
    [
        ({"rule": "topk"}, (LAST,), True),
        ({"rule": "topk", "score": "received_attention"}, (LAST,), False),
        ({"rule": "topk", "score": "norm"}, (), False),
        ({"rule": "visionzip"}, (LAST,), True),
        ({"rule": "window_topk"}, (5, LAST), True),
        ({"rule": "window_topk", "shallow_layer": 7}, (7, LAST), True),
        ({"rule": "visprune"}, (LAST,), True),
        ({"rule": "maxmin"}, (), False),
        ({"rule": "coverage"}, (LAST,), True),
        ({"rule": "coverage", "score": "uniform"}, (), False),
        ({"rule": "mmr"}, (LAST,), False),
        ({"rule": "mmr", "score": "rarity"}, (), False),
        ({"rule": "prumerge_plus"}, (LAST,), True),
        ({"rule": "random", "seed": 3}, (), False),
        ({"rule": "uniform"}, (), False),
        ({"rule": "resize"}, (), False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_json_form_says_what_the_tower_must_give(
    select: dict[str, Any], layers: tuple[int, ...], cls: bool
) -> None:
    selector = TypeAdapter(AnySelector).validate_json(json.dumps(select))
    assert type(selector) is SELECTORS[select["rule"]]
    assert selector.model_dump(exclude_unset=True) == select
    assert (selector.reads_layers(), selector.needs_cls) == (layers, cls)
    assert selector.mixes is (select["rule"] in ("visionzip", "prumerge_plus"))
    with pytest.raises(ValidationError, match="extra_forbidden"):
        TypeAdapter(AnySelector).validate_python({**select, "sharpness": 1})


@pytest.mark.parametrize(
    "select",
    [
        {},
        {"rule": "best"},
        {"rule": "topk", "score": "beauty"},
        {"rule": "maxmin", "features": "pixels"},
        {"rule": "coverage", "alpha": -1.0},
        {"rule": "coverage", "alpha": math.nan},
        {"rule": "mmr", "trade": 1.5},
        {"rule": "visprune", "share": "0.5"},
        {"rule": "window_topk", "window": 0},
        {"rule": "visionzip", "contextual": 1.0},
        {"rule": "random", "seed": -1},
    ],
    ids=str,
)
def test_a_wrong_json_form_is_refused(select: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnySelector).validate_python(select)


def test_verify_holds_the_selectors_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "selector_checks", lambda seed: selector_checks.selector_checks(seed, 36, (5, 12)))
    data = json.loads(output(capsys, "verify", "--selectors", "--seed", "7", "--json"))
    assert {check["check"] for check in data["selectors"]} > set(PLAIN)
    monkeypatch.setitem(selector_checks.PLAIN, "topk", lambda image, count: (list(range(count)), None))
    failed = [line for line in output(capsys, "verify", "--selectors", code=1).splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == ["topk"]
