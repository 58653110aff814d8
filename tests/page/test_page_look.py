"""Look: the patches on the page are those that the Hugging Face reference keeps, to the index."""

import re
from typing import Any

import pytest
from page_browser import PROFILE, expect, look_at, numbers

from eos_search.chats import chat_prompt
from eos_search.reference import ReferenceModel
from eos_vllm import profiles
from eos_vllm.cluttervqa import make_sample
from eos_vllm.models import embedded

pytestmark = pytest.mark.serving


def reference_kept(reference: ReferenceModel, number: int, question: str, budget: int) -> list[list[int]]:
    """What the Hugging Face reference keeps of a sample, by reducer: the image's own indices."""
    prompt = chat_prompt(reference.processor, question, 1)
    embeddings, spans, ids = reference.embed(prompt, [make_sample("test", number).image], budget)
    kept = reference.prefill(embeddings, spans, budget, ids=ids.tolist()).kept
    (span,) = spans
    return [[p - span.start for p in positions.tolist() if span.start <= p < span.end] for positions in kept]


def kept_here(card: Any) -> list[list[int]]:
    """What the page says was kept, by reducer, as its pictures and its text have it."""
    drawn = [figure.get_attribute("data-kept").split(",") for figure in card.locator("figure[data-kept]").all()]
    card.locator("summary").click()
    written = card.locator(".indices").all_inner_texts()
    assert [[int(index) for index in indices] for indices in drawn] == [numbers(text) for text in written]
    return [numbers(text) for text in written]


@pytest.mark.parametrize("budget", [330, 32])
def test_kept_patches_are_the_references_and_those_of_a_second_question_too(budget: int, page: Any) -> None:
    reference = ReferenceModel.from_pretrained(str(embedded.path()), profiles.load(PROFILE), block=32)
    first, second = (question.text for question in make_sample("test", 0).questions[:2])
    page.locator("nav a[href='#look']").click()
    page.locator("#second").fill(second)
    card = look_at(page, budget)
    page.locator("[data-question='2'] canvas").first.wait_for()
    assert kept_here(card) == reference_kept(reference, 0, first, budget)
    other = page.locator("[data-question='2']")
    assert kept_here(other) == reference_kept(reference, 0, second, budget)
    assert "of them as for the first question" in other.inner_text()
    # A picture for each segment of layers, drawn: neither empty nor of one colour.
    assert card.locator("canvas").count() == 1 + len(profiles.load(PROFILE).reducers)
    colours = "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    before = [canvas.evaluate(colours) for canvas in card.locator("canvas").all()]
    assert min(before) > 20
    page.locator("#goes").select_option("tint")
    assert card.locator("canvas").last.evaluate(colours) != before[-1]


def test_patches_can_be_read_by_the_keyboard(page: Any) -> None:
    card = look_at(page, 330)
    canvas = card.locator("canvas").nth(1)
    canvas.focus()
    canvas.press("ArrowRight")
    expect(card.locator(".reading")).to_contain_text("patch 0 (row 1, column 1)")
    canvas.press("ArrowDown")
    expect(card.locator(".reading")).to_contain_text(
        re.compile(r"patch 24 \(row 2, column 1\) is (kept|discarded), importance")
    )


def test_the_next_turn_reuses_what_the_first_one_kept(page: Any) -> None:
    page.locator("nav a[href='#look']").click()
    page.locator("#second").fill(make_sample("test", 0).questions[1].text)
    page.locator("#second-how").select_option("turn")
    look_at(page, 330)
    reuse = page.locator("[data-question='2'] .reuse")
    expect(reuse).to_contain_text("The image was not computed again")
    hit, prompt = numbers(reuse.inner_text())[:2]
    assert 576 <= hit < prompt
