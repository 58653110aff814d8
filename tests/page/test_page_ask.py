"""Ask: one question at several budgets, and the live plan, in a browser before a real server."""

import json
import re
from typing import Any

import pytest
from page_browser import PROFILE, ask_here, expect, numbers, slide, stream

from eos_vllm.cli.main import main
from eos_vllm.cluttervqa import make_sample
from eos_vllm.models import embedded

pytestmark = pytest.mark.serving


def test_it_loads_and_says_what_it_talks_to(page: Any) -> None:
    expect(page.locator("#server")).to_contain_text(f"embedded with {PROFILE}")
    expect(page.locator("#server .good")).to_have_text("reduction proved in every worker")
    assert page.locator("nav [aria-current]").inner_text() == "Ask"
    assert not page.locator("#banner").is_visible()
    for view in ("look", "watch", "choose"):
        page.locator(f"nav a[href='#{view}']").click()
        expect(page.locator(f"#{view}")).to_be_visible()
        assert page.locator("main .view:visible").count() == 1
        assert page.evaluate("document.activeElement.id") == view


def test_three_budgets_side_by_side(page: Any) -> None:
    sample = make_sample("test", 0)
    expect(page.locator("#question")).to_have_value(sample.questions[0].text)
    assert page.locator("#budgets .chip").count() == 3
    ask_here(page)
    cards = page.locator(".answer")
    assert cards.count() == 3
    assert cards.first.locator("h3").inner_text() == "all 576 tokens"
    # The embedded model answers 99 % rightly without reduction, this question among them.
    assert cards.first.locator(".said").inner_text().strip().lower() == sample.questions[0].answer
    held = []
    for i in range(3):
        figures = dict(
            zip(cards.nth(i).locator("dt").all_inner_texts(), cards.nth(i).locator("dd").all_inner_texts(), strict=True)
        )
        assert re.fullmatch(r"[\d.,]+ m?s", figures["First token after"])
        assert numbers(figures["Prompt tokens"])[0] > 576
        assert re.fullmatch(r"[\d,]+", figures["Hit tokens"])
        held.append(numbers(figures["KV blocks held"])[0])
    assert held == sorted(held, reverse=True)
    assert held[0] > held[-1] > 0


def test_words_that_differ_are_marked(page: Any) -> None:
    answers = iter(("a red circle and a dog", "a blue circle and a dog", "a red circle and a dog"))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=stream(next(answers))),
    )
    ask_here(page)
    assert page.locator(".answer mark").all_inner_texts() == ["blue"]
    assert "1 of 2 differ" in page.locator("#ask-note").inner_text()


@pytest.mark.parametrize("budget", [576, 400, 330])
def test_the_slider_says_what_eos_vllm_plan_says(budget: int, page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slide(page, budget)
    capsys.readouterr()
    command = (
        f"plan --profile {PROFILE} --model {embedded.path()} --retain {budget} --block-size 32 --dtype float32 --json"
    )
    assert main(command.split()) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    rows = dict(
        zip(
            page.locator("#plan tbody th").all_inner_texts(),
            [row.locator("td").all_inner_texts() for row in page.locator("#plan tbody tr").all()],
            strict=True,
        )
    )
    reduced, stock = plan["reduced"], plan["stock"]
    assert numbers(rows["KV blocks"][0]) == [sum(s["blocks"] for s in reduced["segments"])]
    assert numbers(rows["KV blocks"][1]) == [sum(s["blocks"] for s in stock["segments"])]
    for cell, want in zip(rows["KV memory"][:2], (reduced, stock), strict=True):
        assert float(cell.removesuffix(" MiB")) == pytest.approx(want["allocated_bytes"] / 2**20, rel=0.005)
    for cell, want in zip(rows["Prefill"][:2], (reduced, stock), strict=True):
        assert float(cell.removesuffix(" GFLOP")) == pytest.approx(want["flops"] / 1e9, rel=0.005)
    shown = [numbers(text) for text in page.locator("#plan .what").all_inner_texts()]
    assert shown == [[s["tokens"], s["blocks"]] for s in reduced["segments"]]
