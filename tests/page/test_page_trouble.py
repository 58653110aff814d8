"""What goes wrong: images that are none, text that is markup, wrong keys, servers that die or know nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from page_browser import KEY, ask_here, choose_file, expect, look_at, running, stream

from eos_vllm.cli.server_process import Server, free_port
from eos_vllm.page.proxy import page_app

pytestmark = pytest.mark.serving
EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


@pytest.mark.parametrize(
    ("name", "kind", "data", "said"),
    [
        ("holiday.png", "image/png", b"\x89PNG\r\n\x1a\n" + b"no image" * 9, "“holiday.png” is broken"),
        ("notes.txt", "text/plain", b"text", "“notes.txt” is text/plain"),
        ("empty.png", "image/png", b"", "“empty.png” is empty"),
        ("page.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is image/svg+xml"),
    ],
)
def test_what_is_no_image_is_refused_before_it_is_sent(name: str, kind: str, data: bytes, said: str, page: Any) -> None:
    choose_file(page, name, kind, data)
    expect(page.locator("#image-error")).to_contain_text(said)
    expect(page.locator("#image-name")).to_contain_text("Sample 0")  # the one before is still there
    page.locator("#sample").click()
    expect(page.locator("#image-error")).to_be_hidden()


def test_an_image_of_50_mb_is_refused_kindly(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(50 << 20)
    sent: list[int] = []
    page.on("request", lambda request: sent.append(len(request.post_data or "")))
    page.locator("#file").set_input_files(large)
    expect(page.locator("#image-error")).to_contain_text("“large.png” has 50.0 MiB; up to 10 MiB are taken")
    assert max(sent, default=0) < 1 << 20


def test_the_servers_own_refusal_is_one_line(page: Any) -> None:
    """A browser shows more formats than a server reads; here the server is sent bytes that are none."""
    broken = "data:image/png;base64,bm8gaW1hZ2U="

    def spoil(route: Any) -> None:
        body = route.request.post_data_json
        body["messages"][0]["content"][0]["image_url"]["url"] = broken
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", spoil)
    page.locator("#go").click()
    error = page.locator(".answer .error").first
    expect(error).to_be_visible()
    assert "\n" not in error.inner_text()
    assert 10 < len(error.inner_text()) <= 300
    page.unroute("**/v1/chat/completions")
    ask_here(page)


def test_a_question_and_an_answer_are_text(page: Any) -> None:
    page.locator("#question").fill(EVIL)
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream(EVIL))
    )
    ask_here(page)
    assert page.locator(".answer .said").first.inner_text() == EVIL
    page.unroute("**/v1/chat/completions")
    card = look_at(page, 330)  # by the real server and model
    assert EVIL in card.locator("h2").inner_text()
    page.route("**/eos/status", lambda route: route.fulfill(status=503, json={"error": EVIL}))
    page.locator("#key-button").click()  # a new key is tried at once
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    expect(page.locator("#server .bad")).to_contain_text("<img")
    assert page.locator("main img[src='x'], #server img").count() == 0
    assert "hacked" not in page.title()


def test_keys(open_page: Callable[..., Any], server: Server) -> None:
    page = open_page(server.url, None)
    expect(page.locator("#banner")).to_contain_text("asks for an API key (HTTP 401)")
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("wrong-key")
    page.locator("#key").press("Enter")
    expect(page.locator("#banner")).to_contain_text("refuses this API key (HTTP 401)")
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    page.locator("#plan .segment").first.wait_for()
    expect(page.locator("#banner")).to_be_hidden()
    assert page.evaluate("sessionStorage.getItem('eos-api-key')") == KEY
    assert page.evaluate("localStorage.getItem('eos-api-key')") is None
    ask_here(page)


def test_a_server_that_dies_and_comes_back(open_page: Callable[..., Any], server: Server) -> None:
    """By ``eos-vllm page --base-url``, whose end is quick: for a browser it is the server."""
    port = free_port()
    with running(page_app(server.url), port):
        page = open_page(f"http://127.0.0.1:{port}")
        page.locator("#plan .segment").first.wait_for()
        page.locator("#preview").wait_for()
        page.locator("#question").fill("Still here?")
    page.locator("#go").click()
    expect(page.locator("#banner")).to_contain_text("The server does not answer. Trying again every 2 s")
    expect(page.locator(".answer .error").first).to_have_text("the server does not answer")
    with running(page_app(server.url), port):
        expect(page.locator("#banner")).to_be_hidden()
        assert page.locator("#question").input_value() == "Still here?"
        ask_here(page)
        assert page.locator(".answer .error").count() == 0


def test_a_server_without_the_plugin(open_page: Callable[..., Any]) -> None:
    """What plain requests and /metrics can tell is there, what can't be known is said to be missing."""
    plain = FastAPI()
    plain.get("/v1/models")(lambda: {"data": [{"id": "stock"}]})
    one, other = free_port(), free_port()
    with running(plain, one), running(page_app(f"http://127.0.0.1:{one}/v1"), other):
        page = open_page(f"http://127.0.0.1:{other}", None)
        expect(page.locator("#server")).to_contain_text("stock, without a profile")
        expect(page.locator("#plan")).to_contain_text("makes no plans")
        expect(page.locator("#budgets")).to_have_text("as the server answers")
        page.locator("nav a[href='#look']").click()
        expect(page.locator("#look-error")).to_contain_text("keeps no traces")
        page.locator("nav a[href='#choose']").click()
        expect(page.locator("#choose-note")).to_contain_text("no measured points")
