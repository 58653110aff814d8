"""The chosen budget in streams: only the chunk with usage is another, and an end is passed on to vLLM's generator."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from types import SimpleNamespace
from typing import Any

from eos_vllm.serving.streamed_budget import read_budget, tell_budget

TEXT = {"id": "a", "choices": [{"index": 0, "delta": {"content": '"choices":[] é'}}]}
USAGE = {"id": "a", "choices": [], "usage": {"total_tokens": 7}}
END = "data: [DONE]\n\n"


def sent(body: dict[str, Any]) -> str:
    """A server-sent event as vLLM writes it."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def given(items: Iterable[Any], closed: list[bool] | None = None) -> AsyncGenerator[Any, None]:
    """An asynchronous generator; notes in ``closed`` when it ends."""
    try:
        for item in items:
            yield item
    finally:
        if closed is not None:
            closed.append(True)


async def collected(results: Iterable[Any], chunks: Iterable[str]) -> list[str]:
    """All chunks, once all results have passed."""
    chosen: dict[str, Any] = {}
    assert [result async for result in read_budget(given(results), chosen)] == list(results)
    return [chunk async for chunk in tell_budget(given(chunks), chosen)]


def result(told: dict[str, Any] | None) -> Any:
    """A request's output."""
    return SimpleNamespace(kv_transfer_params=told)


def test_the_chunk_with_usage_tells() -> None:
    chunks = [sent(TEXT), sent(USAGE), END]
    text, usage, end = asyncio.run(collected([result(None), result({"eos_retain": 96, "other": 1})], chunks))
    assert (text, end) == (chunks[0], chunks[2])
    assert json.loads(usage.removeprefix("data: ")) == {**USAGE, "kv_transfer_params": {"eos_retain": 96}}
    assert usage.endswith("\n\n")


def test_others_are_passed_on_as_they_are() -> None:
    chunks = [sent(TEXT), sent(USAGE), END]
    for results in ([], [result(None)], [result({"other": 1})]):
        assert asyncio.run(collected(results, chunks)) == chunks
    assert asyncio.run(collected([result({"eos_retain": 96})], [sent(TEXT), END])) == [sent(TEXT), END]


def test_of_several_answers_the_first_is_told() -> None:
    results = [result({"eos_retain": 96}), result({"eos_retain": 64})]
    (usage,) = asyncio.run(collected(results, [sent(USAGE)]))
    assert json.loads(usage.removeprefix("data: "))["kv_transfer_params"] == {"eos_retain": 96}


def test_a_client_that_hangs_up_ends_the_stream_at_once() -> None:
    closed: list[bool] = []

    async def hang_up() -> None:
        stream = tell_budget(given([sent(TEXT), END], closed), {})
        await anext(stream)
        await stream.aclose()
        assert closed == [True]

    asyncio.run(hang_up())
