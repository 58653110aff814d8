"""Watch and Choose, small screens, dark and light, and names of all controls."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from page_browser import PATIENCE, ask_here, expect, look_at, numbers

from eos_vllm.cli.server_process import Server

pytestmark = pytest.mark.serving


def test_watch_has_units_on_every_axis(page: Any) -> None:
    ask_here(page)  # what was never counted has no chart
    page.locator("nav a[href='#watch']").click()
    page.locator(".chart .u-legend").nth(5).wait_for()
    labels = page.evaluate("[...document.querySelectorAll('.chart')].map(c => c.getAttribute('aria-label'))")
    assert [label.rsplit(", ", 1)[1] for label in labels[:2]] == ["requests", "KV blocks"]
    assert all(len(label.rsplit(", ", 1)[1]) > 3 for label in labels)
    before = numbers(page.locator(".tile", has_text="images reduced").inner_text())
    page.locator("nav a[href='#ask']").click()
    page.locator("#question").fill(f"New question {time.time()}?")
    ask_here(page)
    page.locator("nav a[href='#watch']").click()
    deadline = time.monotonic() + PATIENCE / 1000
    tile = page.locator(".tile", has_text="images reduced")
    while numbers(tile.inner_text()) <= before and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert numbers(tile.inner_text()) > before


def test_a_point_sets_the_slider(page: Any) -> None:
    page.locator("nav a[href='#choose']").click()
    point = page.locator(".scatter .point.served").first
    point.wait_for()
    budget = point.get_attribute("data-budget")
    point.press("Enter")
    expect(page.locator(".choose-grid aside h2")).to_have_text(f"{point.get_attribute('data-profile')} at {budget}")
    assert page.locator("#budget").evaluate("e => e.value") == budget
    titles = page.locator(".scatter text.title").all_text_contents()
    assert len(titles) == 2
    assert all("%" in title or "tokens" in title for title in titles)


@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_a_phone(width: int, open_page: Callable[..., Any], server: Server) -> None:
    page = open_page(server.url, viewport={"width": width, "height": 740}, color_scheme="dark", has_touch=True)
    page.locator("#plan .segment").first.wait_for()
    ask_here(page)
    for view in ("ask", "look", "watch", "choose"):
        page.locator(f"nav a[href='#{view}']").click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").select_option("light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(numbers(dark)) < 150
    assert sum(numbers(light)) > 600


def test_every_control_has_a_name(page: Any) -> None:
    look_at(page)
    nameless = """[...document.querySelectorAll('input, select, textarea, button, canvas, a[href]')].filter(e =>
        !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("[...document.querySelectorAll('img:not([alt])')].length") == 0
    assert (
        page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size")
        == page.locator("[id]").count()
    )
