"""Pictures of the page for the documentation: ``make page-screenshots``.

Starts the embedded model with the page, puts some requests on it so that there is something to watch, and writes
``docs/page/*.png``, in a palette of colours where they would be too large for a repository otherwise.
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import openai
from page_browser import PROFILE, ask_here, chromium, expect, look_at, slide, start_browser
from PIL import Image

from eos_vllm.cli.page import embedded_flags
from eos_vllm.cli.server_process import Server, serve
from eos_vllm.cluttervqa import make_sample
from eos_vllm.models import embedded
from eos_vllm.models.images import to_data_url

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
COLOURS = 256
MOST_BYTES = 250_000
SAMPLE = 3
BUDGETS = (576, 192, 192, 32, 32, 32)  # how often each is asked for


class Load:
    """Requests at changing budgets, until it is ended."""

    def __init__(self, url: str) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(5)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)

    def _ask(self, lane: int) -> None:
        number = 1000 * lane
        while not self.over.wait(0.05):
            sample = make_sample("test", number)
            image = {"type": "image_url", "image_url": {"url": to_data_url(sample.image)}}
            for question in sample.questions[:2]:
                content: Any = [image, {"type": "text", "text": question.text}]
                self.client.chat.completions.create(
                    model="embedded",
                    messages=[{"role": "user", "content": content}],
                    max_tokens=96,
                    temperature=0,
                    extra_body={"vllm_xargs": {"eos_retain": BUDGETS[number % len(BUDGETS)]}, "ignore_eos": True},
                )
            number += 1


def opened(browser: Any, url: str, view: str, **settings: Any) -> Any:
    """The page with a sample that is worth looking at, at a view."""
    context = browser.new_context(**{"viewport": WIDE, "color_scheme": "light", **settings})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(f"{url}/eos/#{view}")
    page.locator("#plan .segment").first.wait_for(state="attached")
    return page


def taken(page: Any, name: str, folder: Path, whole: bool = True) -> None:
    """Writes one picture, of the whole page or of what the screen shows."""
    page.mouse.move(0, 0)
    raw = folder / f"{name}.raw.png"
    page.screenshot(path=raw, full_page=whole)
    with Image.open(raw) as picture:
        whole_colours = picture.convert("RGB")
    file = folder / f"{name}.png"
    whole_colours.save(file, optimize=True)
    if file.stat().st_size > MOST_BYTES:
        whole_colours.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    raw.unlink()
    page.context.close()


def sampled(page: Any, number: int = SAMPLE) -> None:
    """Takes sample ``number``, one after the other: the page begins with the first one by itself."""
    for shown in range(number + 1):
        if shown > 0:
            page.locator("#sample").click()
        expect(page.locator("#image-name")).to_contain_text(f"Sample {shown},")


def all_views(server: Server, folder: Path) -> None:
    """The four views, one of them on a phone as well, one in the dark."""
    with start_browser(chromium()) as browser:
        page = opened(browser, server.url, "ask")
        sampled(page)
        ask_here(page)
        taken(page, "ask", folder)

        page = opened(browser, server.url, "look")
        sampled(page)
        page.locator("#second").fill(make_sample("test", SAMPLE).questions[1].text)
        look_at(page)
        page.locator("[data-question='2'] canvas").first.wait_for()
        taken(page, "look", folder)

        with Load(server.url):
            page = opened(browser, server.url, "watch", viewport={"width": 1280, "height": 1000})
            page.wait_for_timeout(45_000)
            taken(page, "watch", folder)

        page = opened(browser, server.url, "choose")
        page.locator(".scatter .point.served").first.press("Enter")
        taken(page, "choose", folder)

        page = opened(browser, server.url, "ask", viewport=PHONE, device_scale_factor=1)
        sampled(page)
        ask_here(page)
        page.locator("#ask").evaluate("element => element.scrollIntoView()")
        taken(page, "ask-phone", folder, whole=False)

        page = opened(browser, server.url, "look", color_scheme="dark")
        sampled(page)
        slide(page, 192)
        page.locator("#goes").select_option("lines")
        look_at(page)
        taken(page, "look-dark", folder)


def main() -> int:
    """Writes them; 1 where one of them is too large for a repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as logs,
        serve(embedded.path(), embedded_flags(PROFILE), Path(logs) / "log") as server,
    ):
        all_views(server, folder)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.png"))}
    for name, size in sizes.items():
        print(f"{name}: {size / 1000:.0f} kB")
    return int(any(size > MOST_BYTES for size in sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
