"""A real ``vllm serve --eos-profile``: right answers, bad requests, aborts, metrics. One start for all."""

import concurrent.futures
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from eos_search.reference import ReferenceModel
from eos_vllm.cli.demo import counter
from eos_vllm.cli.server_process import Server
from eos_vllm.models.images import sample_image
from support.profiles import make_profile
from support.servers import client_of, messages, serve_profile, tiny_flags

pytestmark = pytest.mark.serving
PROFILE = make_profile(operator_values={"gamma": 0.2, "tau": 0.3, "theta": 0.1, "rho": 0.4, "nu": 0.2})
# Two images and a short question.
FLAGS = tiny_flags("--limit-mm-per-prompt", '{"image": 2}', "--max-num-batched-tokens", "1280", kv_mib=128)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with serve_profile(tiny_model, PROFILE, FLAGS, tmp_path_factory.mktemp("server"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceModel:
    return ReferenceModel.from_pretrained(str(tiny_model), PROFILE, block=32)


def chat(client: openai.OpenAI, chat_messages: list[Any], retain: Any = None, **settings: Any) -> Any:
    extra = {} if retain is None else {"vllm_xargs": {"eos_retain": retain}}
    settings = {"max_tokens": 24, "temperature": 0, **settings}
    return client.chat.completions.create(model="tiny", messages=chat_messages, extra_body=extra, **settings)


def expected(reference: ReferenceModel, question: str, seeds: tuple[int, ...], retain: int | None) -> str:
    prompt = reference.processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image"} for _ in seeds), {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    images = [sample_image(seed) for seed in seeds]
    answer = reference.generate(prompt.removeprefix("<s>"), images, 24, retain)
    return reference.processor.tokenizer.decode(answer.token_ids)


def test_mixed_requests_at_once_are_answered_as_by_the_reference(
    client: openai.OpenAI, reference: ReferenceModel
) -> None:
    asks = [
        (f"Question {i}?", tuple(range(100 + 2 * i, 100 + 2 * i + i % 3)), [None, 16, 192, 600][i % 4])
        for i in range(12)
    ]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda ask: chat(client, messages(ask[0], *ask[1]), ask[2]), asks))
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.choices[0].message.content == expected(reference, *ask)


def test_streaming_and_logprobs(client: openai.OpenAI, reference: ReferenceModel) -> None:
    stream = chat(client, messages("What now?", 7), 48, stream=True, logprobs=True, top_logprobs=3)
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    assert text == expected(reference, "What now?", (7,), 48)
    logprobs = [token.logprob for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert len(logprobs) == 24
    assert all(value <= 0 for value in logprobs)


def test_several_turns(client: openai.OpenAI) -> None:
    first = messages("What is it?", 31)
    answer = chat(client, first).choices[0].message.content
    again = chat(client, [*first, {"role": "assistant", "content": answer}, *messages("And now?", 32)])
    assert again.usage.prompt_tokens > 2 * 576
    assert len(again.choices[0].message.content) > 0


@pytest.mark.parametrize(
    ("retain", "named"),
    [
        ("many", "'many'"),
        (0, "at least 1"),
        (-5, "at least 1"),
        (1.5, "no whole number"),
        ([64], "list"),
        (["64"], "list"),
    ],
)
def test_bad_budget(retain: Any, named: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages("What?", 1), retain)
    assert "eos_retain" in str(error.value)
    assert named in str(error.value)
    assert "give a whole number" in str(error.value)
    assert chat(client, messages("Still there?", 1)).choices[0].message.content


def test_budget_above_the_image_means_no_reduction(client: openai.OpenAI) -> None:
    whole = chat(client, messages("All of it?", 3), 576).choices[0].message.content
    assert chat(client, messages("All of it?", 3), 5000).choices[0].message.content == whole
    assert chat(client, messages("All of it?", 3), 16).choices[0].message.content != whole


def test_broken_and_missing_images(client: openai.OpenAI) -> None:
    broken = messages("What?")
    broken[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8gaW1hZ2U="}})
    with pytest.raises(openai.BadRequestError):
        chat(client, broken)
    with pytest.raises(openai.BadRequestError):
        chat(client, messages("Too many?", 1, 2, 3))
    assert chat(client, messages("Still there?", 1)).choices[0].message.content


def test_image_without_text(client: openai.OpenAI) -> None:
    assert chat(client, [{"role": "user", "content": messages("", 5)[0]["content"][:1]}]).choices[0].message.content


def test_prompt_logprobs_of_discarded_tokens_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        client.chat.completions.create(
            model="tiny", messages=messages("What?", 1), max_tokens=2, extra_body={"prompt_logprobs": 1}
        )
    # The image of a refused request serves the next one all the same: nothing was half sent to the engine.
    assert chat(client, messages("What?", 1)).choices[0].message.content
    whole = {"prompt_logprobs": 1, "vllm_xargs": {"eos_retain": 576}}
    assert client.chat.completions.create(model="tiny", messages=messages("What?", 1), max_tokens=2, extra_body=whole)


def test_beam_search_with_images_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="use_beam_search"):
        client.chat.completions.create(
            model="tiny", messages=messages("What?", 1), max_tokens=2, extra_body={"use_beam_search": True}
        )


def held_blocks(server: Server) -> dict[str, float]:
    text = server.text("/metrics")
    found = re.findall(r'^eos_kv_blocks_held\{[^}]*segment="(\d+)"[^}]*\} (\S+)', text, re.MULTILINE)
    return {segment: float(value) for segment, value in found}


def test_aborted_streams_leave_nothing_behind(client: openai.OpenAI, server: Server) -> None:
    barrier = threading.Barrier(8)

    def ask_and_leave(i: int) -> None:
        barrier.wait()
        stream = chat(client, messages("A long story?", 200 + i), stream=True, max_tokens=400)
        for n, _ in enumerate(stream):
            if n >= i:
                stream.close()
                return

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_and_leave, range(8)))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (counter(server.text("/metrics"), "vllm:num_requests_running") or 0) > 0:
        time.sleep(0.2)
    assert chat(client, messages("Still there?", 1)).choices[0].message.content
    while time.monotonic() < deadline and any(held_blocks(server).values()):
        time.sleep(0.2)
    held = held_blocks(server)
    assert sorted(held) == ["0", "1", "2", "3"]
    assert not any(held.values())


def test_a_budget_in_processor_arguments_is_refused_where_nothing_reads_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
        client.chat.completions.create(
            model="tiny",
            messages=messages("What?", 90),
            max_tokens=2,
            extra_body={"mm_processor_kwargs": {"eos_retain": 32}},
        )


def test_counts_stand_in_metrics_and_log(client: openai.OpenAI, server: Server) -> None:
    def kept() -> list[float | None]:
        text = server.text("/metrics")
        return [counter(text, "eos_visual_tokens_kept_total", f'layer="{layer}"') for layer in PROFILE.layers]

    before = kept()
    chat(client, messages("Two images?", 41, 42), 16)
    from eos_vllm.core.plan import Planner

    want = [(b or 0) + 2 * count for b, count in zip(before, Planner(PROFILE, block=32).counts(16), strict=True)]
    deadline = time.monotonic() + 10
    while kept() != want and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kept() == want
    log = server.log.read_text()
    assert "eos: profile 'test' reduces after layers [1, 3, 5]" in log
    assert re.search(r"eos: engine 000: \d+ images; visual tokens in->kept per reducer \d+->\d+", log)
    assert re.search(r"eos: this worker reduced \d+ images since start: visual tokens \d+->\d+ after layer 1", log)
    assert "Traceback" not in log


def test_a_refusal_harms_no_request_with_the_same_image(client: openai.OpenAI) -> None:
    """Several prompts are rendered before it is known that the first one's images and text fit no step."""

    def status(question: str, *seeds: int) -> int:
        try:
            chat(client, messages(question, *seeds), max_tokens=1)
        except openai.APIStatusError as e:
            return e.status_code
        return 200

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        for seed in range(500, 508):
            refused = pool.submit(status, "What? " * 40, seed, seed + 100)
            others = [pool.submit(status, "What is it?", seed) for _ in range(4)]
            assert refused.result() == 400
            assert [other.result() for other in others] == [200] * 4
