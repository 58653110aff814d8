"""The processor's part of a reducer before the decoder: an image of a prompt has K placeholders instead of all N.

The budget travels as ``mm_processor_kwargs["eos_retain"]``: vLLM hands those to the processor with each request and
makes them part of an image's hash, so that processor cache, encoder cache and prefix cache keep an image at 64 and at
128 tokens apart. :meth:`EosLlavaProcessor.apply` turns the budget into the count before anything is hashed: budgets
that mean the same count share their entries, and so does a request that names none.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, _build_llava_or_pixtral_hf_processor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from eos_vllm.core.budget import REQUEST_FIELD, parse_budget
from eos_vllm.serving.options import planner_of_processor

KEEP = "eos_keep"
FINGERPRINT = "eos_image"
_BUDGET: ContextVar[int | None] = ContextVar("eos_budget", default=None)


@contextmanager
def budget_for_rendering(budget: int | None) -> Iterator[None]:
    """Prompts that are rendered within the block, in its thread, have this budget where they name none themselves."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def fingerprint(pixels: torch.Tensor) -> int:
    """64 bits that tell a processed image ``[3, h, w]`` from others."""
    raw = pixels.detach().cpu().contiguous().view(torch.uint8)  # numpy knows no bfloat16
    digest = hashlib.blake2b(raw.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class EosLlavaProcessor(LlavaMultiModalProcessor):
    """LLaVA's processor, with as many placeholders for an image as its budget means."""

    def __init__(self, info: Any, dummy_inputs: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, dummy_inputs, *args, **kwargs)
        planner = planner_of_processor(info.get_hf_config())
        self.planner = planner if planner is not None and planner.profile.before is not None else None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, of the longest that an image may be: memory is profiled and encoder budgets are made by it."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.planner is not None:
            inputs.hf_processor_mm_kwargs = {REQUEST_FIELD: self.planner.profile.model.visual_tokens}
        return inputs

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with the count of each image's tokens among what is hashed.

        Raises:
            ValueError: embeddings in place of an image.
        """
        given = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if k != KEEP}  # ours alone, never a caller's
        if self.planner is not None and "image" in inputs.mm_data_items:
            if isinstance(inputs.mm_data_items["image"], ImageEmbeddingItems):
                raise ValueError(
                    "image_embeds: this server selects an image's tokens from what its vision tower gives, and "
                    "embeddings have left it; send the image"
                )
            budget = given.pop(REQUEST_FIELD, None)
            budget = _BUDGET.get() if budget is None else parse_budget(budget)
            given[KEEP] = self.planner.image_tokens(budget)
        inputs.hf_processor_mm_kwargs = given
        return super().apply(inputs, *args, **kwargs)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> Any:
        # Not for Hugging Face: its processors are cached by their arguments, and there would be one for every count.
        hf_kwargs = dict(hf_kwargs)
        keep = hf_kwargs.pop(KEEP, None)
        data = super()._call_hf_processor(hf_data, hf_kwargs)
        if keep is not None and "pixel_values" in data:
            pixels = data["pixel_values"]
            data[KEEP] = torch.full((len(pixels),), int(str(keep)), dtype=torch.int64)
            data[FINGERPRINT] = torch.tensor([fingerprint(image) for image in pixels], dtype=torch.int64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        # On the CPU, for it is read on the host.
        ours = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEEP, FINGERPRINT)}
        return {**fields, **ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        keep = hf_processor_mm_kwargs.get(KEEP)
        if keep is None:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        token = self.info.get_hf_config().image_token_index
        return [PromptReplacement(modality="image", target=[token], replacement=[token] * int(str(keep)))]


def build_processor(info: Any, dummy_inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's choice of a processor for a LLaVA, ours in the place of CLIP LLaVA's."""
    stock = _build_llava_or_pixtral_hf_processor(info, dummy_inputs, *args, **kwargs)
    return EosLlavaProcessor(info, dummy_inputs, *args, **kwargs) if type(stock) is LlavaMultiModalProcessor else stock
