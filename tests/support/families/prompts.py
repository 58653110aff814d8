"""What a Hugging Face model of any family gives its decoder: embeddings, positions, deepstack features, image spans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass
class Tokens:
    """The tokens at hand, in order.

    Attributes:
        ids: ``[n]``; those of visual tokens are the image token's.
        hidden: ``[n, d]``.
        positions: rotary positions ``[1, n]``, with M-RoPE ``[3, 1, n]``.
        place: where each stands in the prompt that enters layer 0 ``[n]``.
        image: the image it is a visual token of, -1 for text ``[n]``.
        row: its row in its image's span as the tower gives it ``[n]``; -1 outside of images.
        added: deepstack features, for the outputs of layers 0, 1, ... ``[n, d]`` each; 0 for text.
    """

    ids: Tensor
    hidden: Tensor
    positions: Tensor
    place: Tensor
    image: Tensor
    row: Tensor
    added: list[Tensor]

    def copy(self) -> "Tokens":
        """The same tokens, to be reduced apart from these."""
        return replace(self, image=self.image.clone(), added=list(self.added))

    def keep(self, stays: Tensor) -> None:
        """Drops tokens; ``stays`` ``[n]`` bool."""
        self.ids, self.hidden, self.positions = self.ids[stays], self.hidden[stays], self.positions[..., stays]
        self.place, self.image, self.row = self.place[stays], self.image[stays], self.row[stays]
        self.added = [features[stays] for features in self.added]

    def rows(self, images: int) -> list[list[int]]:
        """Rows of each image that are left as visual tokens."""
        return [self.row[self.image == i].tolist() for i in range(images)]


@dataclass(frozen=True)
class Prompt:
    """What enters decoder layer 0 before anything is reduced.

    Attributes:
        tokens: all of them; each row of an image's span is one of its visual tokens, newlines included.
        spans: ``(start, end)`` of each image.
        newlines: rows of each image that are the model's newline and no patch.
        next_position: rotary position of the first generated token.
    """

    tokens: Tokens
    spans: tuple[tuple[int, int], ...]
    newlines: tuple[tuple[int, ...], ...]
    next_position: int


class _ReachedDecoderError(Exception):
    """The decoder was called; nothing more is wanted."""


class HfModel:
    """A model of any family with its processor, attention weights in reach."""

    def __init__(self, directory: Any, image_text: str) -> None:
        """Loads a model from ``directory``; ``image_text`` stands for one image in its prompts."""
        load = AutoModelForImageTextToText.from_pretrained
        self.model: Any = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.decoder: Any = self.model.model.language_model
        self.image_text = image_text

    def process(self, text: str, images: Sequence[Image.Image]) -> Any:
        """Inputs of the model for a prompt and its images, in its order."""
        return self.processor(text=[text], images=list(images) or None, return_tensors="pt")

    @torch.no_grad()
    def embed(self, text: str, images: Sequence[Image.Image]) -> Prompt:
        """Runs processor and tower, and catches what the model calls its decoder with."""
        inputs = self.process(text, images)
        call = self._decoder_call(inputs)
        ids, hidden, positions = inputs["input_ids"][0], call["inputs_embeds"][0], call.get("position_ids")
        if positions is None:
            positions = torch.arange(len(ids))[None]
        added = []
        for features in call.get("deepstack_visual_embeds") or ():
            added.append(torch.zeros_like(hidden))
            added[-1][call["visual_pos_masks"][0]] = features
        # Of each image alone: spans that touch cannot be told by their ids.
        image_id = self.model.config.image_token_id
        lengths = [int((self.process(self.image_text, [one])["input_ids"] == image_id).sum()) for one in images]
        visual = ids == image_id
        image, row = torch.full_like(ids, -1), torch.full_like(ids, -1)
        image[visual] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        row[visual] = torch.tensor([r for length in lengths for r in range(length)], dtype=torch.long)
        starts = [int((image == i).nonzero()[0, 0]) for i in range(len(lengths))]
        spans = tuple((start, start + length) for start, length in zip(starts, lengths, strict=True))
        newline = getattr(self.model.model, "image_newline", torch.full_like(hidden[0], torch.nan))
        is_newline = (hidden == newline).all(dim=1)
        newlines = tuple(tuple(is_newline[start:end].nonzero()[:, 0].tolist()) for start, end in spans)
        tokens = Tokens(ids, hidden, positions, torch.arange(len(ids)), image, row, added)
        return Prompt(tokens, spans, newlines, int(positions.max()) + 1)

    def _decoder_call(self, inputs: Any) -> dict[str, Any]:
        call: dict[str, Any] = {}

        def catch(_: Any, __: Any, named: dict[str, Any]) -> NoReturn:
            call.update(named)
            raise _ReachedDecoderError

        hook = self.decoder.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _ReachedDecoderError:
            return call
        finally:
            hook.remove()
        raise AssertionError("the model never called its decoder")
