"""The processor's part of a reducer before the decoder: an image of a prompt has K placeholders instead of all N.

The budget travels as ``mm_processor_kwargs["eos_retain"]``: vLLM hands those to the processor with each request and
makes them part of an image's hash, so that processor cache, encoder cache and prefix cache keep an image at 64 and at
128 tokens apart. :meth:`EosProcessorMixin.apply` turns the budget into the count before anything is hashed: budgets
that mean the same count share their entries, and so does a request that names none. Where images have any size, the
budget itself is hashed.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, _build_llava_or_pixtral_hf_processor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems

from eos_vllm.core.budget import REQUEST_FIELD, RetainBudget, parse_budget, plain
from eos_vllm.serving.options import planner_of_processor

# Of each image, with its pixels: tokens in the prompt, tokens it would have there, and a name for its content.
KEEP, TOTAL, FINGERPRINT = "eos_keep", "eos_total", "eos_image"
# Among the arguments that are hashed.
_COUNT, _ASKED = "eos_count", "eos_asked"
_BUDGET: ContextVar[RetainBudget | None] = ContextVar("eos_budget", default=None)


@contextmanager
def budget_for_rendering(budget: RetainBudget | None) -> Iterator[None]:
    """Prompts that are rendered within the block, in its thread, have this budget where they name none themselves."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def fingerprint(pixels: torch.Tensor) -> int:
    """64 bits that tell a processed image from others; how large it was before it was processed, they need not tell."""
    raw = pixels.detach().cpu().contiguous().view(torch.uint8)  # numpy knows no bfloat16
    digest = hashlib.blake2b(raw.numpy().data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class EosProcessorMixin:
    """In front of vLLM's processor of a family: as many placeholders for an image as its budget means."""

    def __init__(self, info: Any, dummy_inputs: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, dummy_inputs, *args, **kwargs)  # type: ignore[call-arg]
        self.planner = planner_of_processor(info.get_hf_config())
        self.selects = self.planner is not None and self.planner.profile.before is not None

    # What a family says of its images.

    @abstractmethod
    def eos_image_tokens(self, data: Any) -> list[int]:
        """Tokens of each processed image, N."""

    @abstractmethod
    def eos_pixels(self, data: Any) -> Sequence[torch.Tensor]:
        """Pixels of each processed image."""

    def eos_placeholders(self, tokens: list[int], index: int, mm_items: Any) -> list[int]:
        """What stands for image ``index`` in the prompt, from what vLLM would put there, ``[N]``."""
        return tokens

    # vLLM's interface.

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, of the longest that an image may be: memory is profiled and encoder budgets are made by it."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.selects:
            inputs.hf_processor_mm_kwargs = {**(inputs.hf_processor_mm_kwargs or {}), REQUEST_FIELD: "100%"}
        return inputs

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with what decides the number of an image's tokens among what is hashed.

        Raises:
            ValueError: a video, or embeddings in place of an image where they won't do.
        """
        if self.planner is not None:
            if len(inputs.mm_data_items.get("video") or ()):  # made-up inputs hold none of them
                raise ValueError("video: this server reduces images, and takes no videos beside them; leave it out")
            if self.planner.image_token is not None and isinstance(
                inputs.mm_data_items.get("image"), ImageEmbeddingItems
            ):
                raise ValueError("image_embeds: which rows of them are ends of rows cannot be told; send the image")
        # Ours alone, never a caller's.
        given = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if k not in (_COUNT, _ASKED)}
        if self.selects and "image" in inputs.mm_data_items:
            if isinstance(inputs.mm_data_items["image"], ImageEmbeddingItems):
                raise ValueError(
                    "image_embeds: this server selects an image's tokens from what its vision tower gives, and "
                    "embeddings have left it; send the image"
                )
            asked = given.pop(REQUEST_FIELD, None)
            budget = _BUDGET.get() if asked is None else parse_budget(asked)
            assert self.planner is not None
            if self.planner.profile.model.visual_tokens is not None:
                given[_COUNT] = self.planner.image_tokens(budget)
            else:
                given[_ASKED] = str(plain(self.planner.budget if budget is None else budget))
        inputs.hf_processor_mm_kwargs = given
        return super().apply(inputs, *args, **kwargs)  # type: ignore[misc]

    def _count(self, arguments: Mapping[str, object], total: int) -> int:
        """Tokens of an image in the prompt, of ``total``."""
        assert self.planner is not None
        if (count := arguments.get(_COUNT)) is not None:
            return min(int(str(count)), total)
        return self.planner.image_tokens(parse_budget(arguments[_ASKED]), total)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        # Not for Hugging Face: its processors are cached by their arguments, and there would be one for every count.
        others = {name: value for name, value in hf_kwargs.items() if name not in (_COUNT, _ASKED)}
        data = super()._apply_hf_processor_main(mm_items, others)  # type: ignore[misc]
        if len(others) < len(hf_kwargs) and "pixel_values" in data:
            totals = self.eos_image_tokens(data)
            data[KEEP] = torch.tensor([self._count(hf_kwargs, total) for total in totals], dtype=torch.int64)
            data[TOTAL] = torch.tensor(totals, dtype=torch.int64)
            data[FINGERPRINT] = torch.tensor([fingerprint(image) for image in self.eos_pixels(data)], dtype=torch.int64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        if not self.selects:
            return fields
        # On the CPU, for it is read on the host.
        ours = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEEP, TOTAL, FINGERPRINT)}
        return {**fields, **ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        others = {name: value for name, value in hf_processor_mm_kwargs.items() if name not in (_COUNT, _ASKED)}
        updates = super()._get_prompt_updates(mm_items, others, out_mm_kwargs)  # type: ignore[misc]
        selects = len(others) < len(hf_processor_mm_kwargs)

        def ours(update: Any) -> Any:
            if update.modality != "image" or self.planner is None:
                return update

            def placeholders(index: int) -> list[int]:
                stock = update.replacement
                tokens = list(stock(index) if callable(stock) else stock)
                if selects:
                    return tokens[: self._count(hf_processor_mm_kwargs, len(tokens))]
                return self.eos_placeholders(tokens, index, mm_items)

            return replace(update, replacement=placeholders)

        return [ours(update) for update in updates]


class EosLlavaProcessor(EosProcessorMixin, LlavaMultiModalProcessor):
    """LLaVA-1.5's processor with counts."""

    def eos_image_tokens(self, data: Any) -> list[int]:
        """All images have the profile's number."""
        assert self.planner is not None
        return [self.planner.visual_tokens] * len(data["pixel_values"])

    def eos_pixels(self, data: Any) -> Sequence[torch.Tensor]:
        """``[3, h, w]`` each."""
        return list(data["pixel_values"])


def build_processor(info: Any, dummy_inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's choice of a processor for a LLaVA, ours in the place of CLIP LLaVA's."""
    stock = _build_llava_or_pixtral_hf_processor(info, dummy_inputs, *args, **kwargs)
    return EosLlavaProcessor(info, dummy_inputs, *args, **kwargs) if type(stock) is LlavaMultiModalProcessor else stock
