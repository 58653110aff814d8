"""Selection before the decoder from rows as they would enter it: for families whose towers no selector looks into.

vLLM's own ``embed_multimodal`` gives all rows of an image; rule and operator then work on them as
:mod:`eos_vllm.serving.preselection` does on what LLaVA-1.5's tower gives.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig

from eos_vllm.core.plan import Planner
from eos_vllm.core.preselection import combine
from eos_vllm.core.selectors import Choice, TowerOutput
from eos_vllm.serving.image_processor import FINGERPRINT, KEEP, TOTAL
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.trace import Recorder

# Choices of images, of some hundred tokens each.
_REMEMBERED = 4096


class RowSelection:
    """Selector and operator on rows that are ready for the decoder."""

    def __init__(self, planner: Planner, model: Any, vllm_config: VllmConfig, counters: Counters) -> None:
        profile = planner.profile
        assert profile.before is not None
        assert profile.selector is not None
        self.planner, self.selector, self.params = planner, profile.selector, profile.params_of(profile.before)
        self.model, self.counters = model, counters
        self.width = vllm_config.model_config.hf_text_config.hidden_size
        self.dtype: Any = vllm_config.model_config.dtype
        self.device = vllm_config.device_config.device_type
        # vLLM counts an image by its K rows, the tower works on all of it: no more at once than memory is profiled for.
        self.tokens_at_once = max(planner.visual_tokens, vllm_config.scheduler_config.max_num_batched_tokens)
        self.rehearsed = False
        self.recorder: Recorder | None = None  # of traces, where the server has any
        self.choices: OrderedDict[tuple[int, int, int], torch.Tensor] = OrderedDict()

    def embed(self, kwargs: dict[str, Any], embed: Callable[..., Any]) -> Any:
        """Rows of each image, in order ``[K, d]`` each.

        Args:
            kwargs: arguments of ``embed_multimodal``.
            embed: vLLM's own, which gives ``[N, d]`` each.

        Raises:
            RuntimeError: an image came without the number of its placeholders.
        """
        numbers = [kwargs.pop(name, None) for name in (KEEP, TOTAL, FINGERPRINT)]
        if any(found is None for found in numbers):
            if any(name.startswith(("pixel_values", "image")) for name in kwargs):
                raise RuntimeError("eos: an image came without the number of tokens that its prompt holds for it")
            return embed(**kwargs)
        counts, totals, images = ([int(n) for n in torch.as_tensor(found).flatten()] for found in numbers)
        rows: list[torch.Tensor] = []
        for start, stop in self._parts(totals):
            part = self.model.eos_images(kwargs, start, stop)
            whole = list(embed(**part))
            if not self.rehearsed:
                # In vLLM's memory profile, whose images keep all tokens: the selector belongs into it.
                self.rehearse(whole)
            rows += self._select(whole, counts[start:stop], images[start:stop], self.model.eos_places(part))
        return rows

    def _parts(self, totals: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of images that the tower takes at once."""
        start = tokens = 0
        for i, total in enumerate(totals):
            if i > start and tokens + total > self.tokens_at_once:
                yield start, i
                start, tokens = i, 0
            tokens += total
        if totals:
            yield start, len(totals)

    def rehearse(self, rows: Sequence[torch.Tensor] | None = None) -> None:
        """Selects from made-up images once, with the server's own budget, before the first request.

        Args:
            rows: of images ``[N, d]``; one of zeros where None.

        Raises:
            RuntimeError: other rows came of it than the prompt would have placeholders for.
        """
        if self.rehearsed:
            return
        self.rehearsed = True
        if rows is None:
            rows = [torch.zeros(self.planner.visual_tokens, self.width, dtype=self.dtype, device=self.device)]
        counters, self.counters = self.counters, Counters(len(self.planner.profile.reducers))
        # The server's own budget may keep all of an image; a client's may not.
        counts = [min(self.planner.image_tokens(None, len(row)), max(1, len(row) // 2)) for row in rows]
        with torch.inference_mode():
            out = self._select(rows, counts, [None] * len(rows))
        self.counters = counters
        for row, keep in zip(out, counts, strict=True):
            if len(row) != keep or not bool(row.isfinite().all()):
                raise RuntimeError(f"eos: rehearsal: an image of {len(row)} tokens, planned {keep}")

    def _select(
        self,
        rows: Sequence[torch.Tensor],
        counts: Sequence[int],
        images: Sequence[int | None],
        places: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """What is left of each image ``[K, d]``; behind a row's features stands its place, where there are places.

        An image of which all is left has been numbered as it is, and its rows carry zeros.
        """
        out = list(rows)
        if places is not None:
            out = [F.pad(row, (0, place.shape[1])) for row, place in zip(rows, places, strict=True)]
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (row, keep) in enumerate(zip(rows, counts, strict=True)):
            if keep < len(row):
                alike.setdefault((len(row), keep), []).append(i)
        for (_, keep), which in alike.items():
            whole = torch.stack([rows[i] for i in which])
            # Behind a token's own features stand those that later layers add to it (deepstack): they go where it goes.
            tower = TowerOutput(whole[..., : self.width], _as_it_is)
            kept = self._choose(tower, keep, [images[i] for i in which])
            if self.recorder is not None and self.recorder.step:
                names = [images[i] for i in which]
                keys = [None if name is None else (name, keep, tower.total) for name in names]
                self.recorder.selected(tower, kept, keys, self.selector, self.params)
            left = combine(tower, Choice(kept), self.selector, self.params)
            if whole.shape[-1] > self.width:
                added = whole[..., self.width :]
                left = torch.cat([left, added.gather(1, kept[..., None].expand(-1, -1, added.shape[-1]))], dim=-1)
            for i, row, own in zip(which, left, kept, strict=True):
                out[i] = (
                    row
                    if places is None
                    else torch.cat([row, to_device(places[i], row.device).to(row.dtype)[own]], dim=1)
                )
        self.counters.count_tokens(0, sum(map(len, rows)), sum(map(len, out)))
        if not self.planner.profile.inside:
            self.counters.images += len(out)
        return out

    def _choose(self, tower: TowerOutput, keep: int, images: Sequence[int | None]) -> torch.Tensor:
        """Rows to keep ``[B, K]``. An image that is known at this count keeps its choice, as in ``preselection``."""
        # The size belongs to the name: processors may make the same pixels of images that are cropped differently.
        total = tower.total
        known = [None if image is None else self.choices.get((image, keep, total)) for image in images]
        fresh = [i for i, choice in enumerate(known) if choice is None]
        if fresh:
            some = tower if len(fresh) == len(images) else TowerOutput(_rows(tower.vision, fresh), _as_it_is)
            for i, kept in zip(fresh, self.selector.choose(some, keep).kept, strict=True):
                known[i] = kept.clone()  # a view would hold the whole batch's
        for image, kept in zip(images, known, strict=True):
            if image is not None and kept is not None:
                self.choices[image, keep, total] = kept
                self.choices.move_to_end((image, keep, total))
        while len(self.choices) > _REMEMBERED:
            self.choices.popitem(last=False)
        return torch.stack(known)  # type: ignore[arg-type]


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host values on the device, without waiting for what it is busy with."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _rows(values: torch.Tensor, which: list[int]) -> torch.Tensor:
    return values[to_device(torch.tensor(which), values.device)]


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    return rows
