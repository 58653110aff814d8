"""Real servers of the tests: the small model's flags, one with a profile, and what is asked of it."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from eos_vllm.cli.server_process import Server, serve
from eos_vllm.core.profile import Profile
from eos_vllm.models.images import sample_image, to_data_url
from support.flags import BASE


def tiny_flags(*more: str, kv_mib: int = 64) -> list[str]:
    """Flags of a server of the small model."""
    return [*BASE[:-1], str(kv_mib << 20), "--served-model-name", "tiny", "--block-size", "32", *more]


@contextmanager
def serve_profile(
    model: Path, profile: Profile, flags: Sequence[str], folder: Path, **environment: str
) -> Iterator[Server]:
    """``vllm serve`` with a profile, which it reads from ``theta.json`` in ``folder``."""
    theta = folder / "theta.json"
    theta.write_text(json.dumps(profile.to_dict()))
    with serve(model, [*flags, "--eos-profile", str(theta)], folder / "log", environment) as running:
        yield running


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    """A client that asks once."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def messages(question: str, *seeds: int) -> list[Any]:
    """A chat of one turn, about made-up images."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": to_data_url(sample_image(s))}} for s in seeds]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def fetch(server: Server, path: str, key: str | None = None, body: Any = None) -> tuple[int, Any]:
    """Status code and JSON of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
