"""A real ``vllm serve`` whose profile selects tokens before the decoder and does nothing else."""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from eos_search.reference import ReferenceModel
from eos_vllm.cli.demo import counter
from eos_vllm.cli.server_process import Server
from eos_vllm.core.profile import parse_profile
from eos_vllm.models.images import sample_image
from support.servers import client_of, messages, serve_profile, tiny_flags

pytestmark = pytest.mark.serving
_PRUNE = {"gate": 1.0, "discard": 0.8, "gamma": 0.2, "tau": 0.2, "theta": 0.0, "rho": 0.0, "nu": 0.5}
PROFILE = parse_profile(
    {
        "schema": "eos-profile/2",
        "name": "before",
        "model": {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": 576},
        "reducers": [{"layer": -1, "select": {"rule": "maxmin"}, **_PRUNE}],
        "budget": {"measure": "layer_average", "tokens": 64},
    }
)
FLAGS = tiny_flags("--limit-mm-per-prompt", '{"image": 2}', "--enable-prompt-tokens-details", kv_mib=128)
# So small that images are split over steps, as stock vLLM may.
FLAGS += ["--max-num-batched-tokens", "640"]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with serve_profile(tiny_model, PROFILE, FLAGS, tmp_path_factory.mktemp("server"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


def ask(client: openai.OpenAI, question: str, seeds: tuple[int, ...], retain: Any = None, **body: Any) -> Any:
    extra = {**({} if retain is None else {"vllm_xargs": {"eos_retain": retain}}), **body}
    chat = messages(question, *seeds)
    return client.chat.completions.create(model="tiny", messages=chat, max_tokens=16, temperature=0, extra_body=extra)


def test_budgets_reach_the_processor_and_answers_are_the_references(client: openai.OpenAI, tiny_model: Path) -> None:
    reference = ReferenceModel.from_pretrained(str(tiny_model), PROFILE)
    # The same image at several budgets, at once.
    asks = [
        (f"Question {i}?", (200 + i // 4,) * (i % 3 > 0) + (300,) * (i % 3 > 1), [None, 16, 150, 600][i % 4])
        for i in range(16)
    ]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: ask(client, *one), asks))
    for (question, seeds, retain), answer in zip(asks, answers, strict=True):
        prompt = reference.processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": "image"} for _ in seeds), {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        ).removeprefix("<s>")
        want = reference.generate(prompt, [sample_image(seed) for seed in seeds], 16, retain)
        assert answer.choices[0].message.content == reference.processor.tokenizer.decode(want.token_ids)
        text = answer.usage.prompt_tokens - len(seeds) * min(64 if retain is None else retain, 576)
        assert 0 < text < 80


def test_an_image_at_one_budget_is_found_again_and_not_at_another(client: openai.OpenAI) -> None:
    def cached(retain: int) -> int:
        return ask(client, "Again?", (500,), retain).usage.prompt_tokens_details.cached_tokens

    assert [cached(256) for _ in range(2)][1] > 200
    assert cached(300) < 32
    assert cached(1000) == 0
    assert cached(576) > 500  # no reduction, by another name


@pytest.mark.parametrize("retain", [0, "many", 1.5])
def test_a_bad_budget_is_refused_and_nothing_is_lost(retain: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="eos_retain"):
        ask(client, "What?", (600,), retain)
    assert ask(client, "What?", (600,)).usage.prompt_tokens < 160


def test_a_budget_in_processor_arguments_counts_and_other_arguments_do_not(client: openai.OpenAI) -> None:
    answer = ask(client, "What?", (601,), mm_processor_kwargs={"eos_retain": 32})
    assert answer.usage.prompt_tokens < 32 + 80
    with pytest.raises(openai.BadRequestError, match="name one budget"):
        ask(client, "What?", (601,), 64, mm_processor_kwargs={"eos_retain": 32})
    for arguments in ({"eos_keep": 16}, {"do_resize": False}, {"eos_retain": 16, "do_resize": False}):
        with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
            ask(client, "What?", (601,), mm_processor_kwargs=arguments)


def test_an_endpoint_that_takes_no_budget(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "messages": [[{"role": "user", "content": "Hello"}]], "max_tokens": 4}
    answer = client.post("/chat/completions/batch", body=body, cast_to=object)
    assert "choices" in answer
    with pytest.raises(openai.BadRequestError, match="takes the server's budget"):
        client.post("/chat/completions/batch", body={**body, "mm_processor_kwargs": {"eos_retain": 32}}, cast_to=object)


def test_report_and_metrics(client: openai.OpenAI, server: Server) -> None:
    def kept() -> float:
        return counter(server.text("/metrics"), "eos_visual_tokens_kept_total", 'layer="-1"') or 0.0

    before = kept()
    ask(client, "Two?", (701, 702), 16)
    deadline = time.monotonic() + 10
    while kept() != before + 32 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kept() == before + 32
    time.sleep(1.1)  # an answer of the status may be a second old
    status = json.loads(server.text("/eos/status"))
    assert (status["status"], status["budget"]["kept"], status["profile"]["layers"]) == ("proved", [64], [-1])
    (worker,) = status["engines"][0]["workers"]
    assert worker["rehearsal"].startswith("passed")
    assert worker["done"]["images"] > 0
    assert worker["planned"] is None
    text = server.text("/metrics")
    assert (counter(text, "eos_requests_total", 'budget="16"') or 0) >= 1
    assert (counter(text, "eos_budget_visual_tokens_kept_total", 'budget="16"') or 0) >= 32
    log = server.log.read_text()
    assert "eos: profile 'before' reduces before the decoder (maxmin): 576 -> [64] visual tokens per image" in log
    assert "Traceback" not in log
