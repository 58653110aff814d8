"""Windows, spans, rounding, and what decides a compact block: properties that caching and chunking rest on."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import make_profile

from eos_vllm.core.plan import AtomicSpan, ImageSpan, Planner, RequestPlan, rounded_count
from eos_vllm.core.windows import WindowRule

MARKER = (7, 8)
PROFILE = make_profile((0, 2, 3), (0.4, 0.3, 0.5), visual=32, tokens=8, schema="eos-profile/2")
BLOCK = 4


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[int], list[ImageSpan]]:
    """Prompts of text (0 to 6), images (9) and markers."""
    prompt: list[int] = draw(st.lists(st.integers(0, 6), max_size=5))
    spans = []
    for _ in range(draw(st.integers(1, 3))):
        spans.append(ImageSpan(len(prompt), 32))
        prompt += [9] * 32 + draw(st.lists(st.integers(0, 6), max_size=5))
        if draw(st.booleans()):
            prompt += [*MARKER, *draw(st.lists(st.integers(0, 6), max_size=5))]
    return prompt, spans


def planned(prompt: list[int], spans: list[ImageSpan], budget: int = 8) -> RequestPlan:
    return Planner(PROFILE, block=BLOCK, marker=MARKER).plan(prompt, spans, budget)


def test_a_window_ends_behind_the_first_marker_behind_the_image() -> None:
    prompt = [1, 7, 8, 9, 9, 3, 7, 7, 8, 4, 7, 8]
    assert WindowRule("turn", MARKER).ends(prompt, [ImageSpan(3, 2)]) == (9,)
    assert WindowRule("turn", (5,)).ends(prompt, [ImageSpan(3, 2)]) == (12,)
    assert WindowRule("turn").ends(prompt, [ImageSpan(3, 2)]) == (12,)
    assert WindowRule("prompt", MARKER).ends(prompt, [ImageSpan(3, 2)]) == (12,)
    assert WindowRule("image", MARKER).ends(prompt, [ImageSpan(3, 2)]) == (5,)


@given(chats())
def test_windows_depend_on_the_prompt_up_to_their_end_only(chat: tuple[list[int], list[ImageSpan]]) -> None:
    prompt, spans = chat
    plan = planned(prompt, spans)
    for i, window in enumerate(plan.windows):
        if prompt[window - 2 : window] != list(MARKER):
            assert window == len(prompt)
            continue
        inside = [span for span in spans if span.end <= window]
        longer = planned([*prompt[:window], 1, *MARKER, 2], inside)
        assert longer.windows[i] == window
        assert longer.query_positions(i) == plan.query_positions(i)


@given(chats())
def test_spans_hold_images_with_their_windows_and_do_not_overlap(chat: tuple[list[int], list[ImageSpan]]) -> None:
    plan = planned(*chat)
    atoms = plan.atomic_spans
    assert all(a.end <= b.start for a, b in itertools.pairwise(atoms))
    for span, window in zip(plan.spans, plan.windows, strict=True):
        assert any(atom.start <= span.start and window <= atom.end for atom in atoms)
    assert planned([9] * 32, [ImageSpan(0, 32)]).atomic_spans == (AtomicSpan(0, 32),)


@given(chats(), st.data())
def test_clipped_steps_cut_no_window(chat: tuple[list[int], list[ImageSpan]], data: st.DataObject) -> None:
    prompt, spans = chat
    plan, computed, reduced = planned(prompt, spans), 0, []
    longest = max(atom.end - atom.start for atom in plan.atomic_spans)
    while computed < len(prompt):
        tokens = plan.clip(computed, min(data.draw(st.integers(longest, 200)), len(prompt) - computed))
        assert tokens > 0
        reduced += list(plan.images_in(computed, computed + tokens))
        computed += tokens
    assert reduced == list(range(len(spans)))


def test_a_step_that_cuts_a_window_is_an_error() -> None:
    plan = planned([1, *[9] * 32, 2, *MARKER, 3], [ImageSpan(1, 32)])
    assert plan.windows == (36,)
    assert plan.images_in(0, 36) == range(1)
    assert plan.images_in(0, 1) == plan.images_in(36, 37) == range(0)
    with pytest.raises(ValueError, match="cut an image"):
        plan.images_in(0, 35)
    with pytest.raises(ValueError, match="cut an image"):
        plan.images_in(4, 37)


@given(st.integers(1, 700), st.integers(1, 64), st.data())
def test_whole_blocks_are_removed_and_something_is_left(total: int, block: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, total))
    rounded = rounded_count(total, keep, block)
    assert (total - rounded) % block == 0
    assert 1 <= rounded <= total
    assert rounded_count(total, keep, 1) == keep
    if keep >= block:
        assert 2 * abs(rounded - keep) <= block


def content(plan: RequestPlan, segment: int, length: int) -> list[object]:
    """What stands in the first ``length`` places of a segment: text by its position, visual tokens by all that picks
    them (the image's place, each count that it went through, and who asks)."""
    places: list[object] = []
    for position in range(plan.prompt_length):
        image = next((i for i, span in enumerate(plan.spans) if span.start <= position < span.end), None)
        if image is None:
            places.append(position)
        elif position - plan.spans[image].start < plan.kept[image][segment]:
            rank = position - plan.spans[image].start
            asked = plan.query_positions(image)
            places.append((plan.spans[image].start, rank, plan.kept[image][: segment + 1], asked))
    assert len(places) == plan.segment_length(segment, plan.prompt_length)
    return places[:length]


@given(chats(), st.integers(1, 31), st.integers(1, 31), st.data())
def test_equal_names_mean_equal_content(
    chat: tuple[list[int], list[ImageSpan]], one: int, other: int, data: st.DataObject
) -> None:
    """What names a compact block fixes the tokens that it holds, however the prompts go on."""
    prompt, spans = chat
    cut = data.draw(st.integers(spans[0].end, len(prompt)))
    inside = [span for span in spans if span.end <= cut]
    longer = [*prompt[:cut], *data.draw(st.lists(st.integers(0, 9), max_size=6)), *MARKER]
    a, b = planned(prompt, spans, one), planned(longer, inside, other)
    for segment in range(4):
        for length in range(BLOCK, min(a.segment_length(segment, cut), b.segment_length(segment, cut)) + 1, BLOCK):
            ends = a.settled_by(segment, length), b.settled_by(segment, length)
            if ends[0] != ends[1] or ends[0] > cut:
                continue
            if a.reductions(segment, ends[0]) == b.reductions(segment, ends[1]):
                assert content(a, segment, length) == content(b, segment, length)


def test_a_prompt_that_goes_on_is_another_than_one_whose_answer_does() -> None:
    """Without a marker a window ends with the prompt: the same tokens, once as an answer, are other queries."""
    short, longer = (planned([9] * 32 + text, [ImageSpan(0, 32)]) for text in ([1, 2], [1, 2, 3, 4, 5, 6]))
    length = 40 - short.removed[1]
    assert short.settled_by(1, length) == longer.settled_by(1, length) == 40
    assert short.reductions(1, 40) != longer.reductions(1, 40)
