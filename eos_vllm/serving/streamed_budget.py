"""The budget that ``--eos-elastic`` chose, in streamed chats: in the chunk that holds their usage.

vLLM's full answers say what an engine hands back about a request (``kv_transfer_params``); chunks of a stream do not. A
client that asks for usage (``stream_options: {"include_usage": true}``) finds the same field there.
"""

import functools
import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

from eos_vllm.core.budget import REQUEST_FIELD

RESULTS = "result_generator"
# Only the last chunk, which holds the usage of all choices, has none; a quote within a text would be escaped.
_USAGE = '"choices":[]'
_HEAD = "data: "


def install_streamed_budget() -> None:
    """Makes streams tell the chosen budget; called where ``--eos-elastic`` is given.

    Symptom without it: a client that streams cannot know the budget. Cause: vLLM's chunks have no such field. Why
    safe: results and chunks pass as they come; the one chunk with usage gets a field more, which clients ignore that
    do not know it. Can go when vLLM's streams hold ``kv_transfer_params``.
    """
    if getattr(OpenAIServingChat, "eos_tells_budgets", False):
        return
    OpenAIServingChat.eos_tells_budgets = True  # type: ignore[attr-defined]
    stream = OpenAIServingChat.chat_completion_stream_generator
    signature = inspect.signature(stream)

    @functools.wraps(stream)
    def telling(*args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        bound = signature.bind(*args, **kwargs)
        chosen: dict[str, Any] = {}
        bound.arguments[RESULTS] = read_budget(bound.arguments[RESULTS], chosen)
        return tell_budget(stream(*bound.args, **bound.kwargs), chosen)

    OpenAIServingChat.chat_completion_stream_generator = telling  # type: ignore[method-assign]


async def read_budget(results: AsyncIterator[Any], chosen: dict[str, Any]) -> AsyncIterator[Any]:
    """Passes results on, and notes in ``chosen`` the first budget that one of them names.

    Args:
        results: request outputs.
        chosen: filled with ``eos_retain``.
    """
    async for result in results:
        told = result.kv_transfer_params
        if told and REQUEST_FIELD in told:
            chosen.setdefault(REQUEST_FIELD, told[REQUEST_FIELD])
        yield result


async def tell_budget(chunks: AsyncGenerator[str, None], chosen: dict[str, Any]) -> AsyncGenerator[str, None]:
    """Passes a stream on, with the budget in the chunk that holds its usage.

    Args:
        chunks: server-sent events of vLLM.
        chosen: what :func:`read_budget` noted.
    """
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _with_budget(chunk, chosen) if chosen and _USAGE in chunk else chunk


def _with_budget(chunk: str, chosen: dict[str, Any]) -> str:
    body = json.loads(chunk.removeprefix(_HEAD)) | {"kv_transfer_params": chosen}
    return f"{_HEAD}{json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
