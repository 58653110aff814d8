"""A browser for tests of the page, and what they do with it: Debian's Chromium by Playwright, or a reason why not."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

import eos_vllm

STATIC = Path(eos_vllm.__file__).parent / "page" / "static"
MODULES = Path(__file__).with_name("modules.test.mjs")
# Playwright's own browsers come from the internet; Debian's doesn't.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Containers run as root, where Chromium's sandbox does not start; /dev/shm is small there.
ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")
PROFILE = "embedded-searched"
KEY = "right-key"
PATIENCE = 20_000  # ms; of slow machines


def chromium() -> str:
    """Path of the browser; skips the test where it or Playwright is missing."""
    pytest.importorskip("playwright", reason="playwright is not installed (pip install 'eos-vllm[dev]')")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


@contextmanager
def start_browser(path: str) -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import expect as expected
    from playwright.sync_api import sync_playwright

    expected.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


def run_modules() -> "subprocess.CompletedProcess[str]":
    """Runs the tests of the page's pure modules in Node; skips where there is none."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    return subprocess.run([node, "--test", str(MODULES)], capture_output=True, text=True, timeout=120, check=False)


def expect(locator: Any) -> Any:
    """Playwright's, which waits."""
    from playwright.sync_api import expect as expected

    return expected(locator)


def numbers(text: str) -> list[int]:
    """Whole numbers of a text, separators left out."""
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


def slide(page: Any, budget: int) -> None:
    """Moves the slider, and waits for its plan."""
    page.locator("#plan:not(.stale) .segment").first.wait_for()
    if page.locator("#budget-number").input_value() == str(budget):
        return
    with page.expect_response(lambda r: r.url.endswith("/eos/plan") and f"[{budget}]" in (r.request.post_data or "")):
        page.locator("#budget-number").fill(str(budget))
        page.locator("#budget-number").press("Tab")
    page.locator("#plan:not(.stale) .segment").first.wait_for()


def ask_here(page: Any) -> None:
    """Asks, and waits for all answers."""
    page.locator("#go").click()
    expect(page.locator("#ask-note")).to_contain_text("Asked")


def look_at(page: Any, budget: int | None = None) -> Any:
    """Looks, and gives the first question's card."""
    if budget is not None:
        slide(page, budget)
    page.locator("nav a[href='#look']").click()
    page.locator("#look-go").click()
    page.locator("[data-question='1'] canvas").first.wait_for()
    return page.locator("[data-question='1']")


def choose_file(page: Any, name: str, kind: str, data: bytes) -> None:
    """As if a user chose the file."""
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def stream(text: str) -> str:
    """A chat completion's events."""
    chunks: list[dict[str, Any]] = [
        {"id": "chatcmpl-x", "choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
    ]
    chunks.append({"id": "chatcmpl-x", "choices": [], "usage": {"completion_tokens": 1, "prompt_tokens": 9}})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@contextmanager
def running(app: FastAPI, port: int) -> Iterator[None]:
    """Serves an application from a thread; its port is free behind the block."""
    service = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    while not service.started:
        time.sleep(0.02)
    try:
        yield
    finally:
        service.should_exit = True
        thread.join(20)
