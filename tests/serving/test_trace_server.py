"""What a real server tells a client of its request: ``GET /eos/trace/{id}``, and the budget that was chosen for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from eos_vllm.cli.server_process import Server
from eos_vllm.core.plan import Planner
from support.profiles import make_profile
from support.servers import client_of, fetch, messages, serve_profile, tiny_flags

pytestmark = pytest.mark.serving
PROFILE = make_profile()
KEY = "right-key"


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = tiny_flags("--api-key", KEY, "--eos-page", "--eos-elastic", "32:256")
    with serve_profile(tiny_model, PROFILE, flags, tmp_path_factory.mktemp("trace")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server, KEY)


def ask(client: openai.OpenAI, seed: int, wish: Any, budget: int | None = 32, **more: Any) -> Any:
    return client.chat.completions.create(
        model="tiny",
        messages=messages("What?", seed),
        max_tokens=4,
        extra_body={"vllm_xargs": {"eos_trace": wish} | ({} if budget is None else {"eos_retain": budget})},
        **more,
    )


def trace(server: Server, name: str, key: str = KEY) -> tuple[int, Any]:
    return fetch(server, f"/eos/trace/{name}", key)


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_by_the_response_s_id(stream: bool, client: openai.OpenAI, server: Server) -> None:
    answer = ask(client, 1 + stream, True, stream=stream)
    name = {chunk.id for chunk in answer}.pop() if stream else answer.id
    assert trace(server, name, "wrong-key")[0] == 401
    code, found = trace(server, name)
    assert (code, found["id"], found["budget"]) == (200, name, "32")
    (image,) = found["images"]
    assert (image["tokens"], image["rows"], image["columns"], image["reused"]) == (576, 24, 24, False)
    counts = Planner(PROFILE, 32, block=32).counts()
    assert [len(reducer["kept"]) for reducer in image["reducers"]] == list(counts)
    assert [segment["layer_from"] for segment in found["segments"]] == [0, 2, 4, 6]
    assert all(segment["kv_blocks"] > 0 for segment in found["segments"])
    assert trace(server, name)[0] == 404


def test_what_holds_no_trace(client: openai.OpenAI, server: Server) -> None:
    assert trace(server, ask(client, 3, False).id)[0] == 404
    code, body = trace(server, "chatcmpl-nobody")
    assert code == 404
    assert "eos_trace" in body["error"]
    with pytest.raises(openai.BadRequestError, match="eos_trace"):
        ask(client, 4, "please")


def test_the_route_is_documented(server: Server) -> None:
    paths = json.loads(server.text("/openapi.json"))["paths"]
    assert set(paths["/eos/trace/{trace_id}"]["get"]["responses"]) >= {"200", "401", "404", "503"}


def test_the_chosen_budget_is_told(client: openai.OpenAI, server: Server) -> None:
    """In full answers, in streams that ask for usage, and in the trace."""
    whole = ask(client, 5, True, None)
    assert whole.kv_transfer_params == {"eos_retain": 256}
    assert trace(server, whole.id)[1]["budget"] == "256"
    chunks = list(ask(client, 6, False, None, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].kv_transfer_params == {"eos_retain": 256}
    assert chunks[-1].usage.completion_tokens == 4
    assert not any(hasattr(chunk, "kv_transfer_params") for chunk in chunks[:-1])
    for more in ({}, {"stream_options": {"include_usage": True}}):  # nobody asked; the request's own budget
        chunks = list(ask(client, 7, False, 32 if more else None, stream=True, **more))
        assert not any(hasattr(chunk, "kv_transfer_params") for chunk in chunks)
