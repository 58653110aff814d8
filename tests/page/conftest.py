"""One server and one browser for all tests of the page."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_browser import KEY, PATIENCE, PROFILE, chromium, start_browser

from eos_vllm.cli.page import embedded_flags
from eos_vllm.cli.server_process import Server, serve
from eos_vllm.models import embedded


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    chromium()  # no server is started for nothing
    flags = [*embedded_flags(PROFILE), "--api-key", KEY]
    with serve(embedded.path(), flags, tmp_path_factory.mktemp("page") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with start_browser(chromium()) as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; none of them may have thrown anything, nor been stopped by the policy."""
    contexts, errors = [], []

    def opened(url: str, key: str | None = KEY, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('eos-api-key', {json.dumps(key)})")
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(f"{url}/eos/")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def page(open_page: Callable[..., Any], server: Server) -> Any:
    """The page with its first sample and plan."""
    opened = open_page(server.url)
    opened.locator("#plan .segment").first.wait_for()
    opened.locator("#preview").wait_for()
    return opened
