"""LLaVA-NeXT: a small copy of the image, then its tiles row by row; the end of each row is text."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.serving.contract import Takes
from eos_vllm.serving.hosts.base import EosHostMixin
from eos_vllm.serving.hosts.host import Grid, GridOf, Host, check_rows_selector
from eos_vllm.serving.image_processor import EosProcessorMixin


def row_ends(info: Any, width: int, height: int) -> tuple[int, int, int]:
    """Of an image: tokens in front of the grid, rows of the grid, and visual tokens of a row.

    Args:
        info: vLLM's processing info of the model.
        width: of the image, in pixels.
        height: of the image.
    """
    config, encoder = info.get_hf_config(), info.get_vision_encoder_info()
    grid = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, encoder.get_image_size())
    patches, rows = info._get_num_unpadded_features(
        original_height=height,
        original_width=width,
        npatches=encoder.get_patch_grid_length(),
        num_patch_height=grid[0],
        num_patch_width=grid[1],
    )
    total = info.get_num_image_tokens(image_width=width, image_height=height)
    return total - patches - rows, rows, patches // rows


class RowEndsMixin(EosProcessorMixin):
    """Processors of models that put a learnt row (``image_newline``) behind each row of an image's grid.

    vLLM fills such a place with the vision model's output like any other, whatever token stands there. Ours is the
    tokenizer's line break, so that everyone who sees the prompt can tell text from visual tokens.
    """

    def eos_row_ends(self, width: int, height: int) -> tuple[int, int, int]:
        """Of an image: tokens in front of the grid, rows of the grid, and visual tokens of a row."""
        return row_ends(self.info, width, height)  # type: ignore[attr-defined]

    def eos_placeholders(self, tokens: list[int], index: int, mm_items: Any) -> list[int]:
        """Line breaks where rows of the grid end."""
        images = mm_items["image"]
        if self.planner is None or self.planner.image_token is None or not isinstance(images, ImageProcessorItems):
            return tokens
        size = images.get_image_size(index)
        before, rows, width = self.eos_row_ends(size.width, size.height)
        row = [tokens[0]] * width + [self.line_break]
        return tokens[:before] + row * rows

    @property
    def line_break(self) -> int:
        """The tokenizer's line break."""
        return self.info.get_tokenizer().encode("\n", add_special_tokens=False)[-1]  # type: ignore[attr-defined]

    def eos_image_tokens(self, data: Any) -> list[int]:
        """Tokens of each processed image."""
        info: Any = self.info  # type: ignore[attr-defined]
        sizes = torch.as_tensor(data["image_sizes"]).tolist()
        return [info.get_num_image_tokens(image_width=width, image_height=height) for height, width in sizes]

    def eos_pixels(self, data: Any) -> Sequence[torch.Tensor]:
        """Pixels of each processed image."""
        return list(data["pixel_values"])


class EosLlavaNextProcessor(RowEndsMixin, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's processor with counts and row ends."""


@MULTIMODAL_REGISTRY.register_processor(
    EosLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class EosLlavaNextForConditionalGeneration(EosHostMixin, LlavaNextForConditionalGeneration):
    """vLLM's class with reducers."""


def check(profile: Profile, config: Any) -> None:
    """Refuses what :func:`check_rows_selector` does, and images that ask themselves: their last places are row ends.

    Raises:
        SettingError: one of these.
    """
    if profile.before is None and profile.importance.queries == "image":
        problem = "an image's last places are no visual tokens in this family"
        raise SettingError("profile.importance.queries", "image", problem, "let text ask")
    check_rows_selector(profile, config)


def image_token(config: Any) -> int:
    """The token of visual places; others within an image are row ends."""
    return config.image_token_index


def grids(model_config: Any) -> GridOf:
    """The small copy, a square over the whole image; then the grid, whose padding is cut off, over it again."""
    info: Any = MULTIMODAL_REGISTRY.get_processing_info(model_config)

    def grid(data: Any, tokens: int) -> Grid:
        if data is None or "image_sizes" not in data:
            return Grid()
        height, width = (int(n) for n in data["image_sizes"].data)
        before, rows, columns = row_ends(info, width, height)
        side = math.isqrt(before)
        if side * side != before or before + rows * (columns + 1) != tokens:
            return Grid()
        boxes: list[tuple[float, float, float, float] | None] = list(cells(side, side))
        whole = cells(rows, columns)
        for row in range(rows):
            boxes += [*whole[row * columns : (row + 1) * columns], None]
        return Grid(boxes=boxes)

    return grid


def cells(rows: int, columns: int) -> list[tuple[float, float, float, float]]:
    """The cells of a grid over a whole image, row by row."""
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]


_INFO = "vllm.model_executor.models.llava_next:LlavaNextProcessingInfo"
ROW_ENDS = (
    Takes(f"{_INFO}._get_num_unpadded_features", ("original_height", "original_width", "npatches")),
    Takes(f"{_INFO}.get_num_image_tokens", ("image_width", "image_height")),
)
HOST = Host("LLaVA-NeXT", ("mistral", "llama", "qwen2"), check, image_token, grids, ROW_ENDS)
