"""The chat template's generation prompt, at which windows of kind ``turn`` end: found by rendering, proved on chats."""

import itertools
from typing import Any

from eos_vllm.core.plan import ImageSpan
from eos_vllm.core.windows import WindowRule

# Questions of unlike endings, for tokens at a border depend on what stands in front of it.
_QUESTIONS = ("What is it?", "Name 3", "how many")


def find_marker(model_config: Any, chat_template: str | None = None) -> tuple[int, ...]:
    """Tokens of the generation prompt as they stand behind a question.

    A template without one (Mistral's) marks the end of the question instead; those tokens are taken then.

    Args:
        model_config: vLLM's, for tokenizer and template.
        chat_template: the server's own template (``--chat-template``); the model's where None.

    Raises:
        ValueError: there is none that can be told from the text around it, and why.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    if model_config.skip_tokenizer_init:
        raise ValueError("the engine has no tokenizer")
    tokenizer = cached_tokenizer_from_config(model_config)

    def tokens(turns: list[str], prompt: bool) -> list[int]:
        text = _render(model_config, tokenizer, turns, prompt, chat_template)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    found = set()
    for question in _QUESTIONS:
        whole, bare = tokens([question], True), tokens([question], False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, bare, strict=False)))
        found.add(tuple(whole[same:]))
    if found == {()}:
        found = {_common_end([tokens([question], True) for question in _QUESTIONS])}
    if len(found) != 1 or not (marker := found.pop()):
        raise ValueError(f"its generation prompt has no fixed tokens ({sorted(found)})")
    for question, later in itertools.pairwise(_QUESTIONS):
        whole, chat = tokens([question], True), tokens([question, "It is red.", later], True)
        end = WindowRule("turn", marker).ends(chat, [ImageSpan(0, 1)])[0]
        if end != len(whole) or chat[:end] != whole:
            raise ValueError("the tokens of a first turn change when a chat goes on")
    return marker


def _common_end(chats: list[list[int]]) -> tuple[int, ...]:
    """Tokens in which all chats end."""
    columns = zip(*(reversed(chat) for chat in chats), strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))[::-1]


def _render(model_config: Any, tokenizer: Any, turns: list[str], prompt: bool, chat_template: str | None) -> str:
    from vllm.renderers.hf import safe_apply_chat_template

    chat: list[Any] = []
    for i, text in enumerate(turns):
        image = [{"type": "image"}] if i == 0 else []
        chat.append({"role": ("user", "assistant")[i % 2], "content": [*image, {"type": "text", "text": text}]})
    try:
        return str(
            safe_apply_chat_template(
                model_config,
                tokenizer,
                chat,
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )
    except Exception as e:  # a template may raise what it likes
        raise ValueError(f"it cannot be rendered ({e})") from None
