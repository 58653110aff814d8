"""What is sent for an ask: the body of a chat completion, whole or broken on purpose."""

import json
from typing import Any

from loadtests.scenarios import Ask
from loadtests.settings import BUDGET_FIELD, Workload

_BROKEN_IMAGE = "data:image/png;base64,bm8gaW1hZ2U="
_TOO_LONG = 1_000_000


def user_message(ask: Ask) -> dict[str, Any]:
    """The user's turn: pictures first, so that the question that follows decides what is kept of them."""
    images = [{"type": "image_url", "image_url": {"url": picture.encoded}} for picture in ask.pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": ask.prompt}]}


def system_message(ask: Ask) -> list[dict[str, Any]]:
    """What stands in front of all turns: the system prompt, or nothing."""
    return [{"role": "system", "content": ask.system}] if ask.system else []


def body_of(workload: Workload, ask: Ask, messages: list[dict[str, Any]]) -> dict[str, Any] | bytes:
    """The request for ``messages``, whose last one is the ask's own."""
    body: dict[str, Any] = {
        "model": workload.model,
        "messages": messages,
        "max_tokens": ask.output_tokens or workload.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if workload.fixed_output:
        body["ignore_eos"] = True
    if ask.budget is not None:
        body["vllm_xargs"] = {BUDGET_FIELD: ask.budget}
    return body if ask.fault is None else _broken(body, ask.fault)


def _broken(body: dict[str, Any], fault: str) -> dict[str, Any] | bytes:
    match fault:
        case "no_json":
            return json.dumps(body).encode()[:-20]
        case "no_messages":
            return {key: value for key, value in body.items() if key != "messages"}
        case "unknown_model":
            return body | {"model": "no-such-model"}
        case "broken_image":
            image = {"type": "image_url", "image_url": {"url": _BROKEN_IMAGE}}
            return body | {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]}
        case "too_long":
            return body | {"messages": [{"role": "user", "content": "x" * _TOO_LONG}]}
        case "bad_budget":
            return body | {"vllm_xargs": {BUDGET_FIELD: "many"}}
    raise ValueError(fault)
