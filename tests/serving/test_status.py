"""``GET /eos/status`` of a real server: who may ask, what it says, and that it sees a proof that is lost."""

import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from eos_vllm.cli.demo import counter
from eos_vllm.cli.server_process import Server, serve
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import profile_digest
from support import broken_proof
from support.profiles import make_profile
from support.servers import client_of, fetch, messages, serve_profile, tiny_flags

pytestmark = pytest.mark.serving
PROFILE = make_profile()
KEY = "right-key"
FLAGS = tiny_flags("--api-key", KEY)
get = partial(fetch, key=KEY)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("status")
    environment = broken_proof.install(folder / "plugin")
    with serve_profile(tiny_model, PROFILE, FLAGS, folder, VLLM_LOGGING_LEVEL="INFO", **environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server, KEY)


def ask(client: openai.OpenAI, seed: int, retain: Any = None) -> None:
    extra = {} if retain is None else {"vllm_xargs": {"eos_retain": retain}}
    client.chat.completions.create(model="tiny", messages=messages("What?", seed), max_tokens=4, extra_body=extra)


def status_when(server: Server, holds: Callable[[int, Any], bool]) -> tuple[int, Any]:
    """The first answer that holds, or the last of some seconds: an answer may be a second old."""
    deadline = time.monotonic() + 15
    while not holds(*(found := get(server, "/eos/status"))) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found


def test_nothing_of_the_page_is_there_without_its_flag(server: Server) -> None:
    for path in ("/eos/choices", "/eos/plan"):
        assert get(server, path)[0] == 404


def in_workers(server: Server, method: str, *args: str) -> None:
    body = json.dumps({"method": method, "args": args}).encode()
    request = urllib.request.Request(f"{server.url}/collective_rpc", body, {"Content-Type": "application/json"})
    request.add_header("Authorization", f"Bearer {KEY}")
    urllib.request.urlopen(request, timeout=30).close()


@pytest.mark.parametrize("path", ["/eos/status", "/v1/models"])
def test_it_takes_the_key_that_the_api_takes(path: str, server: Server) -> None:
    assert get(server, path, key=None) == (401, {"error": "Unauthorized"})
    assert get(server, path, key="wrong-key") == (401, {"error": "Unauthorized"})
    assert get(server, path)[0] == 200


def test_what_it_says(client: openai.OpenAI, server: Server) -> None:
    for seed, retain in ((1, None), (2, 16)):
        ask(client, seed, retain)
    with pytest.raises(openai.BadRequestError):
        ask(client, 3, "many")
    code, found = status_when(server, lambda _, body: body["front_end"]["refused"] == 1)
    assert (code, found["status"], found["reasons"]) == (200, "proved", [])
    planner = Planner(PROFILE, block=32)
    assert found["profile"]["name"] == "test"
    assert found["profile"]["digest"] == profile_digest(PROFILE)
    assert found["profile"]["source"].endswith("theta.json")
    assert (found["profile"]["measure"], found["profile"]["layers"]) == ("final", [1, 3, 5])
    assert (found["budget"]["retain"], found["budget"]["kept"]) == (64, list(planner.counts()))
    assert found["front_end"] == {"server": 0, "servers": 1, "requests": 2, "refused": 1}
    (engine,) = found["engines"]
    (worker,) = engine["workers"]
    kept = [sum(pair) for pair in zip(planner.counts(), planner.counts(16), strict=True)]
    done = {"images": 2, "tokens_in": [2 * 576, *kept[:-1]], "tokens_kept": kept}
    assert worker["done"] == worker["planned"] == done
    assert worker["segments"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert worker["backends"] == ["EosSegment_CPUAttentionBackend"]
    assert worker["rehearsal"].startswith("passed")
    assert "/eos/status" in get(server, "/openapi.json")[1]["paths"]


def test_budgets_stand_in_metrics(client: openai.OpenAI, server: Server) -> None:
    def value(name: str, label: str) -> float:
        return counter(server.text("/metrics"), name, label) or 0.0

    names = [("eos_requests_total", 'budget="48"'), ("eos_budget_images_total", 'budget="48"')]
    names.append(("eos_budget_visual_tokens_kept_total", 'budget="48"'))
    before = [value(*name) for name in names]
    ask(client, 10, 48)
    ask(client, 10, 48)  # from the prefix cache
    kept = Planner(PROFILE, block=32).counts(48)
    want = [before[0] + 2, before[1] + 1, before[2] + kept[-1]]
    deadline = time.monotonic() + 10
    while [value(*name) for name in names] != want and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [value(*name) for name in names] == want
    hits = [value("eos_prefix_hit_tokens_total", f'segment="{s}"') for s in range(4)]
    removed = [0, *(576 - count for count in kept)]
    assert [hits[0] - hit for hit in hits] == removed


def lost(server: Server) -> float | None:
    return counter(server.text("/metrics"), "eos_proof_lost", 'engine="0"')


def test_attention_that_was_replaced_is_seen_and_mended(server: Server) -> None:
    assert lost(server) == 0
    in_workers(server, "eos_break", "attention")
    code, found = status_when(server, lambda code, _: code == 503)
    assert (code, found["status"]) == (503, "lost")
    assert "layers.4" in found["reasons"][0]
    assert "unreduced lengths" in found["reasons"][0]
    assert lost(server) == 1
    in_workers(server, "eos_mend")
    assert status_when(server, lambda code, _: code == 200)[0] == 200
    assert lost(server) == 0


def test_an_engine_that_hangs_is_seen_and_comes_back(server: Server) -> None:
    (engine,) = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in p.name()]
    engine.send_signal(signal.SIGSTOP)
    try:
        code, found = status_when(server, lambda code, _: code == 503)
        assert (code, found["status"], found["engines"]) == (503, "unknown", [])
        assert found["reasons"] == ["the workers did not answer within 5 s"]
    finally:
        engine.send_signal(signal.SIGCONT)
    assert status_when(server, lambda code, _: code == 200)[0] == 200


def test_images_that_were_planned_and_not_reduced_are_seen(client: openai.OpenAI, server: Server) -> None:
    """Last of all: such a worker stays lost. The request is answered as if nothing were wrong."""
    in_workers(server, "eos_break", "reduction")
    ask(client, 99)
    code, found = status_when(server, lambda code, _: code == 503)
    assert code == 503
    assert "after layer 1" in found["reasons"][0]
    assert "were planned" in found["reasons"][0]
    assert get(server, "/eos/status")[0] == 503
    assert lost(server) == 1
    assert "the reduction is not proved" in server.log.read_text()


def test_a_server_without_a_profile_has_no_such_path(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, FLAGS, tmp_path / "log") as plain:
        assert get(plain, "/eos/status")[0] == 404
        assert "eos_" not in plain.text("/metrics")
