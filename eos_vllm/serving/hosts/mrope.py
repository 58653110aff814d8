"""What Qwen's vision-language models share: images of any size in flat fields, positions of three coordinates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eos_vllm.serving.hosts.base import EosHostMixin
from eos_vllm.serving.image_processor import EosProcessorMixin


class GridProcessorMixin(EosProcessorMixin):
    """Processors that give ``image_grid_thw`` and the patches of all images in one tensor."""

    def eos_image_tokens(self, data: Any) -> list[int]:
        """Tokens of each processed image: patches over the square of the merge size."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return (torch.as_tensor(data["image_grid_thw"]).prod(dim=-1) // merge**2).tolist()

    def eos_pixels(self, data: Any) -> Sequence[torch.Tensor]:
        """Patches of each processed image."""
        return data["pixel_values"].split(torch.as_tensor(data["image_grid_thw"]).prod(dim=-1).tolist())


class GridHostMixin(EosHostMixin):
    """Models with M-RoPE."""

    def eos_images(self, kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        """Patches of all images stand one behind the other."""
        grid = torch.as_tensor(kwargs["image_grid_thw"])
        ends = [0, *grid.prod(dim=-1).cumsum(dim=0).tolist()]
        patches = slice(ends[start], ends[stop])
        return {
            name: value[patches if name == "pixel_values" else slice(start, stop)] for name, value in kwargs.items()
        }

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """As vLLM's; an image that lost tokens before the decoder counts on as text does.

        What is left of it then has no grid of its own. (A rehearsal's image has no pixels, and none either.)
        """
        sizes = [self._grid(feature) for feature in mm_features]
        whole = [
            grid is not None and int(np.prod(grid)) == feature.mm_position.length
            for grid, feature in zip(sizes, mm_features, strict=True)
        ]
        if all(whole):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        parts: list[np.ndarray] = []
        done = position = 0
        for feature, grid, is_whole in sorted(
            zip(mm_features, sizes, whole, strict=True), key=lambda found: found[0].mm_position.offset
        ):
            if not is_whole:
                continue  # its places are counted with the text around it
            start = feature.mm_position.offset
            parts.append(np.tile(np.arange(start - done) + position, (3, 1)))
            position += start - done
            parts.append(np.indices(grid).reshape(3, -1) + position)
            position, done = int(parts[-1].max()) + 1, start + feature.mm_position.length
        parts.append(np.tile(np.arange(len(input_tokens) - done) + position, (3, 1)))
        positions = np.concatenate(parts, axis=1)
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)

    def _grid(self, feature: Any) -> tuple[int, int, int] | None:
        """Frames, rows and columns of an image in tokens; None where the feature holds none."""
        if feature.data is None or "image_grid_thw" not in feature.data:
            return None
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        frames, rows, columns = feature.data["image_grid_thw"].data.tolist()
        return frames, rows // merge, columns // merge
