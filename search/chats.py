"""Questions and chats in a model's own form, and the tokens at which the first turn of its chats ends."""

from collections.abc import Sequence
from typing import Any

from eos_vllm.core.errors import EosError
from eos_vllm.core.windows import generation_marker


def messages(turns: Sequence[str], images: Sequence[Any]) -> list[dict[str, Any]]:
    """A chat in which questions and answers take turns, a question first and last.

    Args:
        turns: their texts.
        images: content parts, in front of the first question.
    """
    return [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [*(() if i else images), {"type": "text", "text": text}],
        }
        for i, text in enumerate(turns)
    ]


def turns_of(question: str, history: Sequence[tuple[str, str]]) -> list[str]:
    """Texts of a chat: the turns in front, each a question and its answer, then the question."""
    return [*(text for turn in history for text in turn), question]


def chat_prompt(processor: Any, question: str, images: int, history: Sequence[tuple[str, str]] = ()) -> str:
    """A question in the model's chat form; the begin token is left to the processor, which writes it itself."""
    return _rendered(processor, messages(turns_of(question, history), [{"type": "image"}] * images), True)


def marker_of(processor: Any) -> tuple[int, ...]:
    """Tokens of the chat template's generation prompt, at which windows of kind ``turn`` end.

    Raises:
        EosError: it cannot be told from the text around it.
    """

    def tokens(turns: Sequence[str], prompt: bool) -> list[int]:
        text = _rendered(processor, messages(turns, [{"type": "image"}]), prompt)
        return list(processor.tokenizer(text, add_special_tokens=False).input_ids)

    try:
        return generation_marker(tokens)
    except ValueError as error:
        name = type(processor).__name__
        raise EosError("chat template", name, str(error), "evaluate prompt@ and image@ on chats") from error


def _rendered(processor: Any, chat: list[dict[str, Any]], prompt: bool) -> str:
    text = processor.apply_chat_template(chat, add_generation_prompt=prompt)
    return text.removeprefix(processor.tokenizer.bos_token or "")
