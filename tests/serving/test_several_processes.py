"""Two engines and two API servers in one service: answers are those of one, and each image is counted once."""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eos_search.reference import ReferenceModel
from eos_vllm.cli.server_process import Server
from eos_vllm.core.plan import Planner
from eos_vllm.models.images import sample_image
from support.profiles import make_profile
from support.servers import client_of, messages, serve_profile, tiny_flags

pytestmark = pytest.mark.serving
PROFILE = make_profile(operator_values={"gamma": 0.2, "tau": 0.3, "theta": 0.1, "rho": 0.4, "nu": 0.2})
REQUESTS = 24


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = tiny_flags("--data-parallel-size", "2", "--eos-page")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_LOGGING_LEVEL": "INFO"}
    with serve_profile(tiny_model, PROFILE, flags, tmp_path_factory.mktemp("processes"), **environment) as running:
        yield running


def figures(server: Server, name: str) -> dict[str, float]:
    """Samples of a metric, by engine."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.text("/metrics")):
        for sample in family.samples:
            if sample.name == name:
                engine = sample.labels["engine"]
                found[engine] = found.get(engine, 0.0) + sample.value
    return found


def status(server: Server) -> Any:
    """Of whichever API server answers; a new connection each time."""
    return json.loads(server.text("/eos/status"))


def ask(server: Server, i: int) -> str:
    # A client of its own, hence a connection of its own: the kernel spreads those over the API servers.
    answer = client_of(server).chat.completions.create(
        model="tiny", messages=messages(f"Question {i}?", 500 + i), max_tokens=12, temperature=0
    )
    return str(answer.choices[0].message.content)


def test_answers_are_right_and_counts_exact(server: Server, tiny_model: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask(server, i), range(REQUESTS)))
    reference = ReferenceModel.from_pretrained(str(tiny_model), PROFILE, block=32)
    for i in range(0, REQUESTS, 5):
        prompt = f"USER: <image>\nQuestion {i}? ASSISTANT:"
        ids = reference.generate(prompt, [sample_image(500 + i)], 12).token_ids
        assert answers[i] == reference.processor.tokenizer.decode(ids), f"request {i}"
    images = figures(server, "eos_images_total")
    assert sum(images.values()) == REQUESTS
    assert len(images) == 2
    assert min(images.values()) > 0
    kept = Planner(PROFILE, block=32).counts()
    assert sum(figures(server, "eos_visual_tokens_kept_total").values()) == REQUESTS * sum(kept)
    assert sum(figures(server, "eos_visual_tokens_in_total").values()) == REQUESTS * sum((576, *kept[:-1]))
    assert sum(figures(server, "eos_requests_total").values()) == REQUESTS
    assert sum(figures(server, "eos_budget_images_total").values()) == REQUESTS
    assert sum(figures(server, "eos_budget_visual_tokens_kept_total").values()) == REQUESTS * kept[-1]
    assert figures(server, "eos_proof_lost") == {"0": 0.0, "1": 0.0}


def test_either_server_tells_of_all_workers(server: Server) -> None:
    deadline = time.monotonic() + 60
    found: dict[int, Any] = {}
    while len(found) < 2 and time.monotonic() < deadline:
        answer = status(server)
        found[answer["front_end"]["server"]] = answer
    images = figures(server, "eos_images_total")
    assert sorted(found) == [0, 1]
    for answer in found.values():
        assert (answer["status"], answer["front_end"]["servers"]) == ("proved", 2)
        assert [engine["engine"] for engine in answer["engines"]] == [0, 1]
        for engine in answer["engines"]:
            (worker,) = engine["workers"]
            assert worker["done"] == worker["planned"]
            assert worker["done"]["images"] == images[str(engine["engine"])]
    assert sum(answer["front_end"]["requests"] for answer in found.values()) == REQUESTS


def test_traces_by_either_server(server: Server) -> None:
    """A trace lies in the engine that answered; each API server asks both."""
    counts = Planner(PROFILE, block=32).counts()

    def traced(i: int) -> str:
        answer = client_of(server).chat.completions.create(
            model="tiny",
            messages=messages("What?", 600 + i),
            max_tokens=4,
            extra_body={"vllm_xargs": {"eos_trace": True}},
        )
        return str(answer.id)

    before = figures(server, "eos_images_total")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        names = list(pool.map(traced, range(12)))
    after = figures(server, "eos_images_total")
    assert min(after[engine] - before[engine] for engine in after) > 0
    for name in names:  # a new connection each time: some of them reach the other API server
        trace = json.loads(server.text(f"/eos/trace/{name}"))
        assert trace["id"] == name
        (image,) = trace["images"]
        assert [len(reducer["kept"]) for reducer in image["reducers"]] == list(counts)
