"""Running servers as lmms-eval's counterpart: are they of this model, and do they keep what their budget says?"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError

_TIMEOUT = 60
_EMBEDDED = "embedded"
# Counters follow an answer with some delay; a server without a profile never gets any.
_COUNTERS_SECONDS = 5
_COUNTER = re.compile(r"^eos_(images|visual_tokens_kept)_total\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def check_server(
    base_url: str, model: str, expected: Sequence[int], flags: str, ask: Callable[[str, str], None] | None = None
) -> bool:
    """Asks about one image, and holds what the server then counts against what it should keep.

    Args:
        base_url: the server, ending in ``/v1``.
        model: name under which it should serve.
        expected: visual tokens of an image after each reducer; empty for a server without a profile.
        flags: what such a server is started with, for the message.
        ask: sends the question; by default through the openai client.

    Returns:
        Whether it could be checked: False where the server shows no counters at all.

    Raises:
        EosError: it cannot be reached, serves another model, or keeps another number of tokens.
    """
    try:
        names = [entry["id"] for entry in json.loads(_get(f"{base_url}/models"))["data"]]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, EosError):
            raise
        problem, remedy = "it is no server of OpenAI's form", "give its base URL, which ends in /v1"
        raise EosError("server", base_url, problem, remedy) from None
    if model not in names:
        raise EosError("--served-model", model, f"the server has {', '.join(names)}", "name one of these")
    before = metrics(base_url)
    if "vllm:" not in before:
        return False
    (ask or _ask)(base_url, model)
    deadline = time.monotonic() + _COUNTERS_SECONDS
    kept: dict[str, float] = {}
    while not kept and time.monotonic() < deadline:
        time.sleep(0.2)
        kept = kept_per_image(before, metrics(base_url))
    if [round(count) for count in kept.values()] != list(expected):
        found, wanted = (list(counts) or "all tokens" for counts in (kept.values(), expected))
        raise EosError("server", base_url, f"of an image it keeps {found}, not {wanted}", f"start it with {flags}")
    return True


def serve_flags(served_model: str, profile: str, budget: int | None, more: str = "") -> list[str]:
    """Flags of a ``vllm serve`` with a profile at a budget; of one without where ``budget`` is None.

    Counts are exact: tables name the tokens that are kept, which a server else rounds to whole KV blocks.
    """
    flags = ["--served-model-name", served_model]
    if budget is not None:
        flags += ["--eos-profile", profile, "--eos-retain", str(budget), "--eos-exact-counts"]
    return flags + more.split()


@contextmanager
def own_server(model: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """Base URL of a ``vllm serve`` for the length of the block.

    Raises:
        EosError: it did not start.
    """
    from eos_vllm.cli.server_process import ServerError, serve

    log.parent.mkdir(parents=True, exist_ok=True)
    if model == _EMBEDDED:
        from eos_vllm.models import embedded

        model = str(embedded.path())
    try:
        with serve(model, flags, log) as server:
            yield f"{server.url}/v1"
    except ServerError as error:
        last = str(error).splitlines()[-1]
        raise EosError("--serve", model, f"the server did not start ({last})", f"see {log}") from None


def metrics(base_url: str) -> str:
    """Text of the server's ``/metrics``; nothing where it has none."""
    try:
        return _get(base_url.removesuffix("/v1") + "/metrics")
    except EosError:
        return ""


def kept_per_image(before: str, after: str) -> dict[str, float]:
    """Visual tokens kept per image by layer between two readings of a server's ``/metrics``; empty without a profile.

    Counted by the server itself, so that a table's budget need not be believed.
    """
    counts = [_counters(text) for text in (before, after)]
    images = sum(value - counts[0].get(key, 0.0) for key, value in counts[1].items() if key[0] == "images")
    kept: dict[str, float] = {}
    for key, value in counts[1].items():
        if key[0] == "visual_tokens_kept" and images > 0:
            kept[key[2]] = kept.get(key[2], 0.0) + (value - counts[0].get(key, 0.0)) / images
    return dict(sorted(kept.items(), key=lambda item: int(item[0])))


def _counters(text: str) -> dict[tuple[str, str, str], float]:
    found = {}
    for name, labels, value in _COUNTER.findall(text):
        known = dict(_LABEL.findall(labels))
        found[name, known.get("engine", ""), known.get("layer", "0")] = float(value)
    return found


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read().decode()
    except (urllib.error.URLError, OSError) as error:
        raise EosError("server", url, f"it cannot be reached ({error})", "start it, or correct the address") from None


def _ask(base_url: str, model: str) -> None:
    from openai import OpenAI

    from eos_vllm.models.images import sample_image, to_data_url

    image = {"type": "image_url", "image_url": {"url": to_data_url(sample_image(0))}}
    content: Any = [image, {"type": "text", "text": "Is there a circle?"}]
    client = OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0, timeout=_TIMEOUT)
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=1)
