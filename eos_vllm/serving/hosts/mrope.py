"""What Qwen's vision-language models share: images of any size in flat fields, positions of three coordinates."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eos_vllm.serving.hosts.base import EosHostMixin
from eos_vllm.serving.hosts.host import Grid, GridOf
from eos_vllm.serving.image_processor import EosProcessorMixin
from eos_vllm.serving.row_selection import to_device


def grids(model_config: Any) -> GridOf:
    """The image, resized to whole cells, is one grid."""
    merge = model_config.hf_config.vision_config.spatial_merge_size

    def grid(data: Any, tokens: int) -> Grid:
        if data is None or "image_grid_thw" not in data:
            return Grid()
        _, rows, columns = (int(n) // merge for n in data["image_grid_thw"].data)
        return Grid(rows, columns) if rows * columns == tokens else Grid()

    return grid


class GridProcessorMixin(EosProcessorMixin):
    """Processors that give ``image_grid_thw`` and the patches of all images in one tensor."""

    def eos_image_tokens(self, data: Any) -> list[int]:
        """Tokens of each processed image: patches over the square of the merge size."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return (torch.as_tensor(data["image_grid_thw"]).prod(dim=-1) // merge**2).tolist()

    def eos_pixels(self, data: Any) -> Sequence[torch.Tensor]:
        """Patches of each processed image."""
        return data["pixel_values"].split(torch.as_tensor(data["image_grid_thw"]).prod(dim=-1).tolist())


# Of what a selection kept: row and column in the image's grid, as two digits each, which bfloat16 holds exactly.
_BASE, _CHANNELS = 256, 4


class GridHostMixin(EosHostMixin):
    """Models with M-RoPE.

    What a selection before the decoder keeps of an image stands where it stood in the image's grid, and text goes on
    behind the whole grid: positions are those of the unreduced prompt, as everywhere in this project. Which tokens are
    kept is known when the vision tower has run, after vLLM has numbered the prompt. So the prompt is numbered with all
    of an image at its first place, selected rows carry their place in the grid, and the model adds it to the step's
    positions: on the device, in steps that prefill images, and nowhere else.
    """

    eos_channels = _CHANNELS
    eos_moved: tuple[torch.Tensor, torch.Tensor] | None = None

    def eos_images(self, kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        """Patches of all images stand one behind the other."""
        grid = torch.as_tensor(kwargs["image_grid_thw"])
        ends = [0, *grid.prod(dim=-1).cumsum(dim=0).tolist()]
        patches = slice(ends[start], ends[stop])
        images = slice(start, stop)
        return {name: value[patches if name == "pixel_values" else images] for name, value in kwargs.items()}

    def eos_places(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Row and column of each token of each image ``[N, 4]``, in two digits each."""
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        found = []
        for _, rows, columns in torch.as_tensor(kwargs["image_grid_thw"]).tolist():
            grid = torch.cartesian_prod(torch.arange(rows // merge), torch.arange(columns // merge))
            found.append(torch.stack([grid // _BASE, grid % _BASE], dim=-1).flatten(1))
        return found

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As vLLM's; takes the places of selected rows off their features.

        Raises:
            RuntimeError: the last step's places were never used: its answers would be wrong.
        """
        if self.eos_moved is not None:
            raise RuntimeError("eos: a step with selected images replayed or replaced the model's forward pass")
        if self.eos_before is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            digits = torch.cat([rows[:, -_CHANNELS:] for rows in multimodal_embeddings]).long().unflatten(1, (2, 2))
            self.eos_moved = is_multimodal, digits[..., 0] * _BASE + digits[..., 1]
            multimodal_embeddings = [rows[:, :-_CHANNELS] for rows in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def eos_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Adds the places of selected rows; in place, for a captured graph reads vLLM's buffer."""
        if self.eos_moved is None:
            return positions
        (mask, places), self.eos_moved = self.eos_moved, None
        moved = positions.new_zeros(len(mask), 2)
        moved.masked_scatter_(to_device(mask, positions.device).unsqueeze(1), places.to(positions.dtype))
        positions[1:, : len(mask)] += moved.T
        return positions

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """As vLLM's; an image that lost tokens before the decoder stands at its first place with all that is left."""
        sizes = [self._grid(feature) for feature in mm_features]
        whole = [
            feature.data is not None and math.prod(grid) == feature.mm_position.length
            for grid, feature in zip(sizes, mm_features, strict=True)
        ]
        if all(whole):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        parts: list[np.ndarray] = []
        done = position = 0
        for feature, grid, is_whole in sorted(
            zip(mm_features, sizes, whole, strict=True), key=lambda found: found[0].mm_position.offset
        ):
            start, length = feature.mm_position.offset, feature.mm_position.length
            parts.append(np.tile(np.arange(start - done) + position, (3, 1)))
            position += start - done
            image = np.indices(grid).reshape(3, -1) if is_whole else np.zeros((3, length), np.int64)
            parts.append(image + position)
            position, done = position + max(grid), start + length
        parts.append(np.tile(np.arange(len(input_tokens) - done) + position, (3, 1)))
        positions = torch.from_numpy(np.concatenate(parts, axis=1))
        return positions, position - done

    def _grid(self, feature: Any) -> tuple[int, int, int]:
        """Frames, rows and columns of an image in tokens; a rehearsal's image, which has no pixels, is one row."""
        if feature.data is None:
            return 1, 1, feature.mm_position.length
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        frames, rows, columns = feature.data["image_grid_thw"].data.tolist()
        return frames, rows // merge, columns // merge
