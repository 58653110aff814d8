"""The generation prompt of the chat template that a server renders with: windows of kind ``turn`` end there."""

from collections.abc import Sequence
from typing import Any

from eos_vllm.core.windows import generation_marker


def find_marker(model_config: Any, chat_template: str | None = None) -> tuple[int, ...]:
    """Tokens of the generation prompt (:func:`~eos_vllm.core.windows.generation_marker`).

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

    def tokens(turns: Sequence[str], prompt: bool) -> list[int]:
        text = _render(model_config, tokenizer, turns, prompt, chat_template)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return generation_marker(tokens)


def _render(model_config: Any, tokenizer: Any, turns: Sequence[str], prompt: bool, chat_template: str | None) -> str:
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
