"""Traces of requests: what they say was kept is what the Hugging Face reference keeps, to the index."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eos_search.reference import ReferenceModel
from eos_search.tower import tower_output
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.images import sample_image
from eos_vllm.serving.kv_cache import planned_blocks, segments_of_groups
from eos_vllm.serving.trace_document import ReducerTrace, SegmentTrace
from support.engines import Ask, BlockWatch, answer_all, engine, marker_of, mixed_asks, scheduler_of
from support.profiles import make_profile
from support.traces import answer_traced, hold_inside

ALL = 576
VALUES = {"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
INSIDE: dict[str, Profile] = {
    "mixes": make_profile(operator_values=VALUES, importance={"queries": "relevant_text"}),
    "prunes": make_profile(layers=(2, 4), operator_values={"discard": 0.8}, importance={"queries": "last_text"}),
}
TURNS = make_profile(schema="eos-profile/2", operator_values=VALUES)
_VALUES = {"gate": 1.0, "tau": 0.1, "theta": 0.0, "rho": 0.0, "nu": 0.0}


def before(select: dict[str, Any], inside: tuple[int, ...] = (), withdraw: int | None = None, **first: Any) -> Profile:
    """A profile with a reducer before the decoder."""
    reducers = [{"layer": -1, "select": select, **_VALUES, "gamma": 0.0, "discard": 0.8, **first}]
    reducers += [{"layer": layer, **_VALUES, "gamma": 0.2, "discard": 0.5} for layer in inside]
    reducers += [] if withdraw is None else [{"layer": withdraw, "withdraw": True}]
    model = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": ALL}
    return parse_profile(
        {
            "schema": "eos-profile/2",
            "name": "before",
            "model": model,
            "importance": {"queries": "all_text", "window": "prompt"},
            "reducers": reducers,
            "budget": {"measure": "final", "tokens": 64},
        }
    )


BEFORE = {
    "maxmin": before({"rule": "maxmin"}),
    "topk-transfer": before({"rule": "topk", "score": "received_attention"}, gamma=0.25),
    "visionzip": before({"rule": "visionzip"}),
    "resize": before({"rule": "resize"}),
    "topk-inside": before({"rule": "topk"}, inside=(3,)),
    "topk-inside-withdrawn": before({"rule": "topk"}, inside=(2, 4), withdraw=6),
}


def hold_segments(llm: Any, ask: Ask, segments: list[SegmentTrace], plan: Any) -> None:
    """Tokens and blocks of each segment are the plan's, of all tokens but the last one, which nobody computed."""
    config = scheduler_of(llm).kv_cache_config
    tokens = plan.prompt_length + ask.max_tokens - 1
    assert [s.tokens for s in segments] == [plan.segment_length(s, tokens) for s in range(len(segments))]
    blocks = [0] * len(segments)
    for segment, count in zip(segments_of_groups(config), planned_blocks(config, plan, tokens), strict=True):
        blocks[segment] += count
    assert [s.kv_blocks for s in segments] == blocks


@pytest.mark.parametrize("name", INSIDE)
def test_inside_the_decoder(name: str, tiny_model: Any) -> None:
    profile = INSIDE[name]
    asks = mixed_asks(9)
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32)
    with engine(tiny_model, profile, page=True) as llm:
        found = answer_traced(llm, asks)
        for ask, (out, trace) in zip(asks, found, strict=True):
            want = hold_inside(trace, ask, reference)
            hold_segments(llm, ask, trace.segments, want.plan)
            assert [s.layer_from for s in trace.segments] == [0, *(layer + 1 for layer in profile.layers)]
            assert trace.hit_tokens == out.num_cached_tokens
            assert trace.budget == (None if ask.budget is None else str(ask.budget))
            for image in trace.images:
                assert (image.tokens, image.rows, image.columns, image.boxes) == (ALL, 24, 24, None)
                hold_operator(image.reducers, mixes=name == "mixes")
            if len(ask.images) == 1:
                hold_scores(trace.images[0].reducers, want.scores)
    assert {len(trace.images) for _, trace in found} == {0, 1, 2}
    reducers = [reducer for _, trace in found for image in trace.images for reducer in image.reducers]
    assert sum(len(reducer.kept) < len(reducer.entered) for reducer in reducers) > 4 * len(profile.layers)


def hold_scores(reducers: list[ReducerTrace], scores: list[torch.Tensor]) -> None:
    """Importance is the reference's, of all that entered; none where nothing was scored."""
    scored = [reducer for reducer in reducers if reducer.importance is not None]
    assert len(scored) == len(scores)
    for reducer, want in zip(scored, scores, strict=True):
        assert reducer.importance == pytest.approx(want.flatten().tolist(), abs=1e-5, rel=1e-3)


def hold_operator(reducers: list[ReducerTrace], mixes: bool) -> None:
    """Each discarded token goes to a kept one, where any does."""
    for reducer in reducers:
        gone = len(reducer.entered) - len(reducer.kept)
        if not (mixes and gone):
            assert (reducer.share, reducer.assigned) == (None, None)
            continue
        assert reducer.assigned is not None
        assert reducer.share is not None
        assert len(reducer.assigned) == gone
        assert set(reducer.assigned) <= set(reducer.kept)
        assert 0 < reducer.share < 1


@pytest.mark.parametrize("name", BEFORE)
def test_before_the_decoder_and_both(name: str, tiny_model: Any) -> None:
    profile = BEFORE[name]
    assert profile.selector is not None
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32 if profile.inside else 1)
    asks = [
        Ask("USER: <image>\nWhat is it? ASSISTANT:", [sample_image(50)], max_tokens=3),
        Ask("USER: <image>\nFirst, <image>\nwhat? ASSISTANT:", [sample_image(51), sample_image(52)], 128, max_tokens=3),
    ]
    again = [Ask(ask.prompt.replace("hat", "here"), ask.images, ask.budget, ask.max_tokens) for ask in asks]
    with engine(tiny_model, profile, page=True, enable_prefix_caching=True) as llm:
        found, later = answer_traced(llm, asks), answer_traced(llm, again)
    for ask, (_, trace) in zip(asks, found, strict=True):
        keep = reference.planner.image_tokens(ask.budget)  # type: ignore[union-attr]
        chosen = [hold_selection(name, profile, reference, image, keep, own.reducers[0])
                  for image, own in zip(ask.images, trace.images, strict=True)]  # fmt: skip
        assert not any(image.reused for image in trace.images)
        if profile.inside:
            hold_inside(trace, ask, reference, chosen)
        else:
            assert [s.layer_from for s in trace.segments] == [0]
    for (_, trace), (_, other) in zip(found, later, strict=True):
        for image, known in zip(trace.images, other.images, strict=True):
            assert known.reused or profile.inside
            if profile.selector.mixes or name == "resize":
                assert known.reducers == []
            else:
                assert known.reducers[0].kept == image.reducers[0].kept


def hold_selection(
    name: str, profile: Profile, reference: ReferenceModel, image: Any, keep: int, found: ReducerTrace
) -> list[int]:
    """A selection is the reference's: what it kept, by which scores, and where the rest went."""
    assert found.layer == -1
    assert found.entered == list(range(ALL))
    if name == "resize":
        side = int(keep**0.5)
        middles = [(2 * i + 1) * 24 // (2 * side) for i in range(side)]
        assert found.kept == [24 * row + column for row in middles for column in middles]
        return found.kept
    selector = profile.selector
    assert selector is not None
    pixels = reference.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    seen = tower_output(reference.model, pixels, selector)
    kept = selector.choose(seen, keep).kept[0]
    assert found.kept == kept.tolist()
    if selector.score_name == "uniform":
        assert found.importance is None
    else:
        assert found.importance == pytest.approx(selector.saliency(seen)[0].tolist(), abs=1e-5, rel=1e-3)
    if name != "topk-transfer":
        assert (found.share, found.assigned) == (None, None)
        return found.kept
    rows = F.normalize(seen.projected[0], dim=-1)
    gone = [place for place in range(ALL) if place not in set(found.kept)]
    best = (rows[gone] @ rows[kept].T).max(dim=-1)
    assert found.assigned == kept[best.indices].tolist()
    assert found.share == pytest.approx(float(torch.sigmoid(10.0 * best.values).mean()), abs=1e-4)
    return found.kept


def test_chunks_and_prefix_hits(tiny_model: Any) -> None:
    """Images that come in steps of their own, and one that was found in the cache beside one that was not."""
    pictures = [sample_image(60), sample_image(61), sample_image(62)]
    two = "USER: <image>\nWhat is in it? ASSISTANT: Red. USER: <image>\nAnd in this? ASSISTANT:"
    asks = [Ask(two, pictures[:2], 128, max_tokens=4), Ask(two, [pictures[0], pictures[2]], 128, max_tokens=4)]
    with engine(tiny_model, TURNS, page=True, max_num_batched_tokens=800) as llm:
        reference = ReferenceModel.from_pretrained(str(tiny_model), TURNS, block=32, marker=marker_of(llm))
        ((_, first),) = answer_traced(llm, asks[:1])
        ((out, second),) = answer_traced(llm, asks[1:])
        ((_, third),) = answer_traced(llm, asks[1:])
    want = hold_inside(first, asks[0], reference)
    assert want.plan.prompt_length > 800
    assert [image.reused for image in second.images] == [True, False]
    assert second.images[0].reducers == []
    other = first.model_copy(update={"images": [first.images[0], second.images[1]]})
    hold_inside(other, asks[1], reference)  # what was reused is what the first request kept
    assert second.hit_tokens == out.num_cached_tokens > ALL
    assert [image.reused for image in third.images] == [True, True]
    assert third.segments == second.segments


def test_preempted_requests_keep_what_they_kept(tiny_model: Any) -> None:
    profile, asks = INSIDE["mixes"], mixed_asks()
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32)
    small = {"max_model_len": 1376, "num_gpu_blocks_override": 4 * (1376 // 32) + 2, "enable_prefix_caching": False}
    with engine(tiny_model, profile, page=True, **small) as llm, BlockWatch(scheduler_of(llm)) as watch:
        found = answer_traced(llm, asks)
    assert watch.reduced_preemptions >= 1
    for ask, (_, trace) in zip(asks, found, strict=True):
        hold_inside(trace, ask, reference)


def test_a_budget_that_keeps_all(tiny_model: Any) -> None:
    # So much text that whole blocks of it can be found again, and with them the whole image.
    question = "What is it, which colour has it, and where does it stand in the picture that you see here?"
    asks = [Ask(f"USER: <image>\n{question} ASSISTANT:", [sample_image(70)], ALL, max_tokens=2)]
    with engine(tiny_model, INSIDE["mixes"], page=True) as llm:
        ((_, trace),) = answer_traced(llm, asks)
        ((_, again),) = answer_traced(llm, asks)
    untouched = (list(range(ALL)), list(range(ALL)), None)
    for found in (trace, again):
        assert [(r.entered, r.kept, r.importance) for r in found.images[0].reducers] == [untouched] * 3
        assert len({segment.tokens for segment in found.segments}) == 1
    assert [found.images[0].reused for found in (trace, again)] == [False, True]


def test_answers_do_not_change(tiny_model: Any) -> None:
    asks = mixed_asks(9)
    with engine(tiny_model, INSIDE["mixes"], page=True, enable_prefix_caching=False) as llm:
        plain, traced = answer_all(llm, asks), answer_traced(llm, asks)
    assert [list(out.outputs[0].token_ids) for out, _ in traced] == [answer.token_ids for answer in plain]
