"""The worker's part of a reducer before the decoder: from pixels to as many rows as the request's budget means.

vLLM puts these rows in the place of the image's placeholders and refuses another number of them, so an image that was
not reduced cannot be served without a word.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_reduce

from eos_vllm.core.plan import Planner
from eos_vllm.core.preselection import combine, shrink_pixels, shrink_positions
from eos_vllm.core.selectors import LAST, Choice, QueriesAndKeys, TowerOutput
from eos_vllm.core.selectors.resize import Resize
from eos_vllm.serving.image_processor import FINGERPRINT, KEEP, TOTAL
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.trace import ImageKey, Recorder

# Choices of images; at 192 tokens each that is 6 MiB.
_REMEMBERED = 4096


class Preselection:
    """Selector and operator on the vision tower's output."""

    def __init__(self, planner: Planner, model: Any, vllm_config: VllmConfig, counters: Counters) -> None:
        profile = planner.profile
        assert profile.before is not None
        assert profile.selector is not None
        self.planner, self.selector, self.params = planner, profile.selector, profile.params_of(profile.before)
        self.model, self.counters = model, counters
        self.encoder = model.vision_tower.vision_model.encoder
        depth = len(self.encoder.layers)
        # vLLM builds the tower up to the layer whose features it reads, so the last one there is the last that runs.
        self.layers = {i: self.encoder.layers[depth - 1 if i == LAST else i] for i in self.selector.reads_layers()}
        # vLLM counts an image by its K rows, the tower works on all of it: no more at once than memory is profiled for.
        self.at_once = max(1, vllm_config.scheduler_config.max_num_batched_tokens // planner.visual_tokens)
        self.rehearsed = False
        self.recorder: Recorder | None = None  # of traces, where the server has any
        self.choices: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def embed(self, kwargs: dict[str, Any], _embed: Any = None) -> Any:
        """Rows of each image of ``embed_multimodal``'s arguments, in order ``[K, d]`` each.

        vLLM's own method is not asked: the tower's layers are looked into.

        Raises:
            RuntimeError: an image came without the number of its placeholders.
        """
        keep, names, _ = (kwargs.pop(name, None) for name in (KEEP, FINGERPRINT, TOTAL))
        image_input = self.model._parse_and_validate_image_input(**kwargs)
        if image_input is None:
            return []
        if keep is None or image_input["type"] != "pixel_values":
            raise RuntimeError("eos: an image came without the number of tokens that its prompt holds for it")
        pixels, counts = image_input["pixel_values"], [int(k) for k in torch.as_tensor(keep).flatten()]
        images = [None] * len(counts) if names is None else [int(n) for n in torch.as_tensor(names).flatten()]
        if not self.rehearsed:
            # In vLLM's memory profile, whose images keep all tokens: the selector belongs into it.
            self.rehearse(pixels[: self.at_once])
        rows: list[torch.Tensor] = []
        for start in range(0, len(counts), self.at_once):
            some = slice(start, start + self.at_once)
            rows += self._embed(pixels[some], counts[some], images[some])
        return rows

    def rehearse(self, pixels: torch.Tensor | None = None) -> None:
        """Selects from made-up images once, with the server's own budget, before the first request.

        Args:
            pixels: processed images; as many as the tower takes at once where None.

        Raises:
            RuntimeError: other rows came of it than the prompt would have placeholders for.
        """
        if self.rehearsed:
            return
        self.rehearsed = True
        if pixels is None:
            config, like = self.model.config.vision_config, self.model.vision_tower.vision_model.embeddings
            weight = like.patch_embedding.weight
            shape = (self.at_once, config.num_channels, config.image_size, config.image_size)
            pixels = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        total, counters = self.planner.visual_tokens, self.counters
        keep = self.planner.image_tokens()
        if keep >= total:  # the server's own budget keeps all; a client's may not
            keep = self.selector.count(total // 2, total)
        self.counters = Counters(len(self.planner.profile.reducers))
        with torch.inference_mode():
            rows = self._embed(pixels, [keep] * len(pixels), [None] * len(pixels))
        self.counters = counters
        if any(len(row) != keep or not bool(row.isfinite().all()) for row in rows):
            raise RuntimeError(f"eos: rehearsal: images of {[len(row) for row in rows]} tokens, planned {keep}")

    def _embed(self, pixels: torch.Tensor, counts: list[int], images: Sequence[int | None]) -> list[torch.Tensor]:
        total = self.planner.visual_tokens
        rows: list[Any] = [None] * len(counts)
        resizes = isinstance(self.selector, Resize)
        seen = None if resizes else self._tower(pixels)
        for k in sorted(set(counts)):
            which = [i for i, count in enumerate(counts) if count == k]
            if resizes:
                out = self._resized(pixels[which], k).projected
                if self.recorder is not None and self.recorder.step and k < total:
                    self.recorder.resized([_key(images[i], k, total) for i in which], cell_middles(k, total))
            else:
                assert seen is not None
                out = self._select(_of(seen, which), k, [images[i] for i in which])
            for i, row in zip(which, out, strict=True):
                rows[i] = row
        self.counters.count_tokens(0, total * len(counts), sum(len(row) for row in rows))
        if not self.planner.profile.inside:
            self.counters.images += len(counts)
        return rows

    def _select(self, tower: TowerOutput, keep: int, images: Sequence[int | None]) -> torch.Tensor:
        """Rows of images of one count ``[B, K, d]``.

        An image that is known at this count keeps its choice. A tower rounds otherwise in another batch, near ties
        would then fall otherwise, and a prefix hit that ends within the image would join two choices. (Rules that mix
        tokens choose anew: of theirs a near tie shifts one token's part.)
        """
        if keep >= tower.total:
            return tower.projected
        if self.selector.mixes:
            choice = self.selector.choose(tower, keep)
            self._record(tower, choice, keep, images)
            return combine(tower, choice, self.selector, self.params)
        known = [None if image is None else self.choices.get((image, keep)) for image in images]
        fresh = [i for i, choice in enumerate(known) if choice is None]
        if fresh:
            chosen = self.selector.choose(_of(tower, fresh), keep).kept
            for i, kept in zip(fresh, chosen, strict=True):
                known[i] = kept.clone()  # a view would hold the whole batch's
        for image, kept in zip(images, known, strict=True):
            if image is not None and kept is not None:
                self.choices[image, keep] = kept
                self.choices.move_to_end((image, keep))
        while len(self.choices) > _REMEMBERED:
            self.choices.popitem(last=False)
        choice = Choice(torch.stack(known))  # type: ignore[arg-type]
        self._record(tower, choice, keep, images)
        return combine(tower, choice, self.selector, self.params)

    def _record(self, tower: TowerOutput, choice: Choice, keep: int, images: Sequence[int | None]) -> None:
        if self.recorder is not None and self.recorder.step:
            keys = [_key(image, keep, tower.total) for image in images]
            self.recorder.selected(tower, choice.kept, keys, self.selector, self.params)

    def _tower(self, pixels: torch.Tensor) -> TowerOutput:
        """Runs the vision tower, and catches what the selector reads of it."""
        caught: dict[int, QueriesAndKeys] = {}
        with _caught(self.layers, caught):
            whole = self.model.vision_tower(pixels, feature_select_strategy="full")
        sharded = self.layers and any(layer.self_attn.tp_size > 1 for layer in self.layers.values())
        join = {"join": mean_over_ranks} if sharded else {}
        # All towers that are served with a selector are CLIP's, whose first token is CLS.
        return TowerOutput(whole[:, 1:], self.model.multi_modal_projector, whole[:, 0], caught, **join)

    def _resized(self, pixels: torch.Tensor, keep: int) -> TowerOutput:
        embeddings = self.model.vision_tower.vision_model.embeddings
        side = math.isqrt(keep)
        if keep >= self.planner.visual_tokens:
            return self._tower(pixels)
        hook = embeddings.position_embedding.register_forward_hook(lambda _, __, out: shrink_positions(out, side))
        try:
            return self._tower(shrink_pixels(pixels, side, embeddings.patch_size))
        finally:
            hook.remove()


def _key(image: int | None, keep: int, total: int) -> ImageKey | None:
    return None if image is None else (image, keep, total)


def cell_middles(keep: int, total: int) -> torch.Tensor:
    """Of a picture made smaller, the patch of the whole one in the middle of each of its patches ``[keep]``."""
    small, side = math.isqrt(keep), math.isqrt(total)
    places = (torch.arange(small) * 2 + 1) * side // (2 * small)
    return torch.cartesian_prod(places * side, places).sum(dim=-1)


def _of(tower: TowerOutput, which: list[int]) -> TowerOutput:
    """Some images of a batch."""
    if len(which) == tower.images:
        return tower
    rows = torch.tensor(which)
    device = tower.vision.device
    # Without waiting for the tower, which a copy from plain memory would.
    rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
    layers = {i: QueriesAndKeys(seen.query[rows], seen.key[rows]) for i, seen in tower.layers.items()}
    cls = None if tower.cls is None else tower.cls[rows]
    return TowerOutput(tower.vision[rows], tower.project, cls, layers, tower.join)


@contextmanager
def _caught(layers: dict[int, nn.Module], seen: dict[int, QueriesAndKeys]) -> Iterator[None]:
    """Catches queries and keys of tower layers within the block, from the projection that they run anyway."""
    hooks = []
    for number, layer in layers.items():
        attention: Any = layer.self_attn

        def catch(_: nn.Module, __: Any, output: Any, number: int = number, attention: Any = attention) -> None:
            query, key, _v = output[0].chunk(3, dim=-1)
            heads = attention.num_heads_per_partition
            seen[number] = QueriesAndKeys(query.unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1)))

        hooks.append(attention.qkv_proj.register_forward_hook(catch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean over tensor-parallel ranks, each with its own heads; all take the first one's, to the last bit."""
    mean = tensor_model_parallel_all_reduce(values) / get_tensor_model_parallel_world_size()
    return get_tp_group().broadcast(mean, src=0)
