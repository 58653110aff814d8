"""From a question with its image and answer to what enters decoder layer 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from eos_search.reference import embed_inputs
from eos_search.tower import tower_output
from eos_vllm.core.errors import SettingError
from eos_vllm.core.layout import Entry, build_layout
from eos_vllm.core.plan import ImageSpan, RequestPlan
from eos_vllm.core.profile import QueryRule
from eos_vllm.core.reduction import image_query_weights
from eos_vllm.core.selectors import Selector, TowerOutput

IMAGE = "<image>"


class Images(Protocol):
    """Where a row's images are; cheap to keep, and fit to go to worker processes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names without the machine's folders, for messages and the fingerprint."""

    def problem(self) -> str | None:
        """Why they cannot be had, as far as that shows without decoding them; None if they can."""

    def load(self) -> list[Image.Image]:
        """The decoded images. Raises OSError if one is broken."""


@dataclass(frozen=True)
class Row:
    """One question about images, with its answer; ``category`` is for counting."""

    id: str
    question: str
    answer: str
    images: Images
    category: str


@dataclass(frozen=True)
class Encoded:
    """A row as token ids ``[tokens]`` (all but the last of the answer's) and processed images, on the host.

    ``targets`` ``[answer]`` are the answer's token ids with the end token; the first is predicted from the last token
    of the prompt.
    """

    index: int
    id: str
    ids: torch.Tensor
    pixel_values: torch.Tensor
    prompt_length: int
    targets: torch.Tensor


@dataclass(frozen=True)
class Broken:
    """A row whose image could not be decoded."""

    index: int
    id: str
    problem: str


@dataclass(frozen=True)
class Prepared:
    """What enters decoder layer 0.

    Attributes:
        id: of the row.
        embeddings: of prompt and answer ``[tokens, d]``.
        spans: the images.
        prompt_length: tokens of the prompt.
        targets: token ids that the last ``len(targets)`` positions are to predict.
        weights: query weights of each image ``[images, T]``.
        is_text: which tokens are text ``[tokens]`` bool.
        towers: what the vision tower gave of each image, where a selector before the decoder reads it.
    """

    id: str
    embeddings: torch.Tensor
    spans: tuple[ImageSpan, ...]
    prompt_length: int
    targets: torch.Tensor
    weights: torch.Tensor
    is_text: torch.Tensor
    towers: tuple[TowerOutput, ...] = ()


class Encoder:
    """Writes rows in the model's chat form and tokenises them."""

    def __init__(self, processor: Any, prompt: str, answer: str, visual_tokens: int, max_tokens: int) -> None:
        """``prompt`` holds ``<image>`` and ``{question}``, ``answer`` ``{answer}``; the end token is appended.

        Raises:
            SettingError: a placeholder is missing.
        """
        for field, text, needed in (
            ("prompt", prompt, IMAGE),
            ("prompt", prompt, "{question}"),
            ("answer", answer, "{answer}"),
        ):
            if needed not in text:
                raise SettingError(
                    field, text, f"without {needed} nothing of it would be there", f"write {needed} into it"
                )
        self.processor, self.prompt, self.answer = processor, prompt, answer
        self.visual_tokens, self.max_tokens = visual_tokens, max_tokens

    def texts(self, row: Row) -> tuple[str, str]:
        """Prompt and answer of a row as text."""
        images = IMAGE * max(1, len(row.images.names))
        question = row.question.replace(IMAGE, "").strip()
        return self.prompt.replace(IMAGE, images).replace("{question}", question), self.answer.replace(
            "{answer}", row.answer.strip()
        )

    def problem(self, row: Row) -> str | None:
        """Why a row is of no use: a reason to count it under; None if it is of use."""
        if not row.images.names:
            return "no image"
        if not row.answer.strip():
            return "no answer"
        if not row.question.replace(IMAGE, "").strip():
            return "no question"
        if problem := row.images.problem():
            return problem
        prompt, answer = self._text_ids(row)
        tokens = len(prompt) + len(answer) + len(row.images.names) * (self.visual_tokens - 1)
        return f"longer than {self.max_tokens} tokens" if tokens > self.max_tokens else None

    def encode(self, index: int, row: Row) -> Encoded | Broken:
        """Tokenises a row and processes its images."""
        try:
            images = row.images.load()
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
            return Broken(index, row.id, f"{type(error).__name__}: {error}")
        prompt, _ = self.texts(row)
        inputs = self.processor(text=prompt, images=images, return_tensors="pt")
        prompt_ids = inputs["input_ids"][0]
        answer_ids = torch.tensor(self._text_ids(row)[1])
        return Encoded(
            index, row.id, torch.cat([prompt_ids, answer_ids[:-1]]), inputs["pixel_values"], len(prompt_ids), answer_ids
        )

    def _text_ids(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids of the prompt (images unexpanded), and of the answer as it continues the prompt, with the end token."""
        tokenizer = self.processor.tokenizer
        prompt, answer = self.texts(row)
        alone, together = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
        follows = together[: len(alone)] == alone
        behind = together[len(alone) :] if follows else tokenizer(answer, add_special_tokens=False).input_ids
        return alone, [*behind, tokenizer.eos_token_id]


@torch.no_grad()
def prepare(
    model: Any, encoded: Encoded, rule: QueryRule, visual_tokens: int, selector: Selector | None = None
) -> Prepared:
    """Embeds an encoded row with the model's own vision tower and embeddings, on the model's device.

    Args:
        model: a Hugging Face LLaVA.
        encoded: the row.
        rule: query rule.
        visual_tokens: of an image.
        selector: what is to choose before the decoder.

    Raises:
        SettingError: the prompt has no image tokens, or not ``visual_tokens`` for each image.
    """
    ids = encoded.ids.to(model.device)
    found = int((ids == model.config.image_token_id).sum())
    images = len(encoded.pixel_values)
    if found != images * visual_tokens:
        problem = f"{images} image(s) became {found} image tokens, not {visual_tokens} each"
        raise SettingError("model", encoded.id, problem, "use the processor that belongs to the model")
    embeddings, spans = embed_inputs(model, ids, encoded.pixel_values)
    weights = query_weights(rule, embeddings, encoded.prompt_length, spans)
    is_text = ids != model.config.image_token_id
    targets = encoded.targets.to(model.device)
    pixels = encoded.pixel_values.to(model.device, model.dtype)
    towers = () if selector is None else tuple(tower_output(model, image[None], selector) for image in pixels)
    return Prepared(encoded.id, embeddings, tuple(spans), encoded.prompt_length, targets, weights, is_text, towers)


def query_weights(
    rule: QueryRule, embeddings: torch.Tensor, prompt_length: int, spans: Sequence[ImageSpan]
) -> torch.Tensor:
    """Query weights of each image ``[images, T]`` in a prompt with its answer ``[tokens, d]``.

    Raises:
        SettingError: a rule by which no text asks.
    """
    whole = RequestPlan(prompt_length, tuple(spans), tuple((span.length,) for span in spans))
    layout = build_layout([Entry(len(embeddings), whole)], 1, rule, embeddings.device)
    weights = image_query_weights(rule, embeddings, layout)
    if weights is None:
        raise SettingError("importance.queries", rule, "the search needs text that asks", "choose a rule of text")
    return weights
