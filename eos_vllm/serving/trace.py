"""The worker's part of traces: what each reducer kept of the images of requests that ask for it.

A step in which such a request has images to come carries their names (:data:`TRACED`); in all others nobody here is
called. What is recorded stays on the device as copies of its own, until it is read (``GET /eos/trace/{id}``) or the
scheduler, which bounds number and size, says that it may go. Nothing waits for the device before it is read.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from eos_vllm.core.importance import complement
from eos_vllm.core.layout import ImageGroup
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.selectors import Selector, TowerOutput
from eos_vllm.serving.trace_document import BEFORE, Record

# Attribute of a scheduler's output: what a step has to do with traces, where it has.
TRACED = "eos_traced"
# An image as a selection before the decoder knows it: fingerprint, tokens kept, tokens of all.
ImageKey = tuple[int, int, int]


@dataclass
class StepTraces:
    """What a step has to do with traces.

    Attributes:
        requests: those that are traced and have images to come, each with the keys of its images, where a selection
            before the decoder has any.
        forget: requests whose records may go.
    """

    requests: dict[str, tuple[ImageKey, ...]] = field(default_factory=dict)
    forget: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Held:
    """One reducer and one image, on the device: ``[K]``, ``[N]``, ``[]``, ``[N - K]``."""

    chosen: torch.Tensor
    importance: torch.Tensor | None
    share: torch.Tensor | None
    assigned: torch.Tensor | None

    def to_record(self, image: int, reducer: int) -> Record:
        """On the host."""
        share = None if self.share is None else float(self.share)
        importance, assigned = (None if t is None else t.tolist() for t in (self.importance, self.assigned))
        return Record(
            image=image,
            reducer=reducer,
            chosen=self.chosen.tolist(),
            importance=importance,
            share=share,
            assigned=assigned,
        )


class Recorder:
    """Of one worker. Of tensor-parallel ranks, which keep the same tokens, the first one's stores."""

    def __init__(self, stores: bool = True) -> None:
        self.stores = stores
        self.step: Mapping[str, Sequence[ImageKey]] = {}
        self.images: dict[int, tuple[str, int]] = {}  # of this step, by number in the batch: request, image
        self.reductions: dict[str, dict[tuple[int, int], _Held]] = {}  # by request, then image and reducer
        self.selections: dict[str, dict[ImageKey, _Held]] = {}

    def begin(self, traces: StepTraces) -> None:
        """A step starts that has to do with traces."""
        for name in traces.forget:
            self.reductions.pop(name, None)
            self.selections.pop(name, None)
        self.step = traces.requests

    def end(self) -> None:
        """It is over."""
        self.step, self.images = {}, {}

    def lay_out(self, entries: Sequence[Any]) -> None:
        """Learns which images the reducing pass of this step will have, in the order of the batch's layout."""
        number = 0
        for entry in entries:
            if entry.plan is None:
                continue
            for image in entry.plan.images_in(entry.computed, entry.computed + entry.scheduled):
                if entry.request_id in self.step:
                    self.images[number] = entry.request_id, image
                number += 1

    def reduced(
        self,
        reducer: int,
        params: OperatorParams,
        hidden: torch.Tensor,
        group: ImageGroup,
        rows: torch.Tensor,
        scores: torch.Tensor,
        chosen: torch.Tensor,
    ) -> None:
        """A reducer within the decoder chose (:data:`eos_vllm.core.reduction.Observer`).

        Args:
            reducer: its number among those within the decoder.
            params: its operator.
            hidden: output of its layer before the operator acts ``[tokens, d]``.
            group: images of one count.
            rows: their visual tokens' rows ``[B, N]``.
            scores: ``[B, N]``.
            chosen: places kept ``[B, K]``.
        """
        if not self.stores:
            return
        acts = params.gamma != 0 and chosen.shape[1] < rows.shape[1]
        for place, number in enumerate(group.numbers):
            if (known := self.images.get(number)) is not None:
                name, image = known
                held = _hold(chosen[place], scores[place], params, hidden[rows[place]] if acts else None)
                self.reductions.setdefault(name, {})[image, reducer] = held

    def selected(
        self,
        tower: TowerOutput,
        kept: torch.Tensor,
        keys: Sequence[ImageKey | None],
        selector: Selector,
        params: OperatorParams,
    ) -> None:
        """A selection before the decoder chose.

        Args:
            tower: of B images.
            kept: places kept ``[B, K]``.
            keys: of the images; None for those without a name.
            selector: the rule.
            params: its operator; a rule that mixes tokens itself has none.
        """
        wanted = [(name, key) for name, own in self.step.items() for key in own if key in keys]
        if not wanted:
            return
        # On all ranks alike: scores may be a mean over them.
        scores = None if selector.score_name == "uniform" else selector.saliency(tower)
        if not self.stores:
            return
        acts = not selector.mixes and params.gamma != 0 and kept.shape[1] < tower.projected.shape[1]
        for name, key in wanted:
            place = keys.index(key)
            held = _hold(
                kept[place],
                None if scores is None else scores[place],
                params,
                tower.projected[place] if acts else None,
            )
            self.selections.setdefault(name, {})[key] = held

    def resized(self, keys: Sequence[ImageKey | None], places: torch.Tensor) -> None:
        """Images were made smaller in front of the tower; ``places`` ``[K]`` stand for what is left of each."""
        for name, own in self.step.items():
            for key in own:
                if self.stores and key in keys:
                    self.selections.setdefault(name, {})[key] = _Held(places, None, None, None)

    def take(self, name: str, keys: Sequence[Sequence[int]], choices: Mapping[Any, torch.Tensor]) -> list[Record]:
        """What was recorded of a request, which is forgotten; the one place that waits for the device.

        Args:
            name: the engine's own name of the request.
            keys: of its images where a selection before the decoder has any, in order.
            choices: what selections remember of images.
        """
        reductions, selections = self.reductions.pop(name, {}), self.selections.pop(name, {})
        if not self.stores:
            return []
        records = [held.to_record(image, reducer) for (image, reducer), held in reductions.items()]
        for image, (fingerprint, keep, total) in enumerate(keys):
            if (held := selections.get((fingerprint, keep, total))) is not None:
                records.append(held.to_record(image, BEFORE))
                continue
            # LLaVA-1.5's images are all of one size, which is then no part of the name.
            chosen = choices.get((fingerprint, keep, total), choices.get((fingerprint, keep)))
            if chosen is not None:
                records.append(Record(image=image, reducer=BEFORE, chosen=chosen.tolist(), remembered=True))
        return records


def _hold(
    chosen: torch.Tensor, scores: torch.Tensor | None, params: OperatorParams, tokens: torch.Tensor | None
) -> _Held:
    """Copies of one image's part: views would hold the whole batch's.

    Args:
        chosen: ``[K]``.
        scores: ``[N]``.
        params: the operator.
        tokens: what entered ``[N, d]``; None where discarded tokens act on none.
    """
    share = assigned = None
    if tokens is not None:
        gone = complement(chosen.unsqueeze(0), len(tokens))[0]
        values = F.normalize(tokens.float(), dim=-1)
        best, assigned = (values[gone] @ values[chosen].mT).max(dim=-1)
        share = torch.sigmoid(params.gate_sharpness * (best - params.theta)).mean()
        assigned = assigned.int()
    copied = None if scores is None else scores.to(torch.float32, copy=True)
    return _Held(chosen.to(torch.int32, copy=True), copied, share, assigned)


def follow_traces(runner_class: Any) -> None:
    """Tells the model's recorder of steps that have to do with traces; called where ``--eos-page`` is given.

    Symptom without it: a worker cannot know which requests are traced. Cause: vLLM's runners have no hook for what a
    plugin's scheduler sends along. Why safe: the step is read, and passed on with the very arguments; other steps cost
    one look. Can go when a scheduler's output carries plugin fields to a hook.
    """
    if getattr(runner_class, "eos_follows_traces", False):
        return
    runner_class.eos_follows_traces = True
    execute = runner_class.execute_model

    @functools.wraps(execute)
    def followed(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        traces = getattr(scheduler_output, TRACED, None)
        recorder = None if traces is None else getattr(self.get_model(), "eos_recorder", None)
        if recorder is None:
            return execute(self, scheduler_output, *args, **kwargs)
        recorder.begin(traces)
        try:
            return execute(self, scheduler_output, *args, **kwargs)
        finally:
            recorder.end()

    runner_class.execute_model = followed
