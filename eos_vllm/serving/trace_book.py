"""The scheduler's part of traces: which requests are traced, what they held at their end, and how many are kept.

It alone bounds what is kept: at most :data:`MOST_REQUESTS` requests and :data:`MOST_BYTES`, on the workers' device and
here together; the oldest go first. Workers drop what it tells them to. A request is known by the id of its response,
which the front end wrote into it (:mod:`eos_vllm.serving.trace_requests`): the engine's own name ends in random
letters.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.plan import Planner, RequestPlan
from eos_vllm.serving.counting import size_of
from eos_vllm.serving.hosts import host_of
from eos_vllm.serving.image_processor import FINGERPRINT
from eos_vllm.serving.requests import image_spans, plan_of_features
from eos_vllm.serving.trace import TRACED, ImageKey, StepTraces
from eos_vllm.serving.trace_document import ImageOutline, Outline, SegmentTrace
from eos_vllm.serving.trace_requests import name_of

MOST_REQUESTS = 64
MOST_BYTES = 32 << 20
# Of a token at a reducer: score, and place among those kept or the kept one that it goes to, in 4 bytes each.
_BYTES = 8
# Of an image in the scheduler's own outline, roughly: a few numbers, whatever its size.
_IMAGE_BYTES = 1 << 11
_NO_KEY = 0


@dataclass
class Entry:
    """A traced request, under way or at its end."""

    request_id: str
    outline: Outline
    keys: tuple[ImageKey, ...]
    plan: RequestPlan
    images_end: int
    size: int
    seen: bool = False
    finished: bool = False


class TraceBook:
    """Of one scheduler."""

    def __init__(self, planner: Planner, vllm_config: Any, managers: Any) -> None:
        """Starts empty.

        Args:
            planner: the server's.
            vllm_config: the engine's.
            managers: of the KV groups (``single_type_managers``).
        """
        self.planner, self.managers = planner, managers
        self.grid = host_of(vllm_config.model_config).grids(vllm_config.model_config)
        self.active: dict[str, Entry] = {}  # by the engine's own name
        self.held: OrderedDict[str, Entry] = OrderedDict()  # by the response's id, the oldest first
        self.forget: list[str] = []
        self.size = 0
        _answer_calls()

    @property
    def is_busy(self) -> bool:
        """Whether a step may have to do with traces."""
        return bool(self.active or self.forget)

    def add(self, request: Request) -> None:
        """Takes a new request in, if it asks for a trace."""
        name = name_of(request.sampling_params)
        if name is None:
            return
        known = self.held.get(name)
        if known is not None and not known.finished:
            if parent_of(known.request_id) != parent_of(request.request_id):
                self._drop(name)  # whoever reads would not know whose it is
            return  # of several answers to one prompt (n > 1) the first is traced
        if known is not None:
            self._drop(name)
        entry = self._entry(name, request)
        self.held[name] = self.active[request.request_id] = entry
        self.size += entry.size
        while len(self.held) > MOST_REQUESTS or self.size > MOST_BYTES:
            self._drop(next(iter(self.held)))

    def announce(self, step: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Puts on board of a step which of its requests are traced, as long as they have images to come."""
        for data in step.scheduled_new_reqs:
            entry = self.active.get(data.req_id)
            if entry is not None and not entry.seen:  # one that comes back after a preemption may look new
                entry.seen, entry.outline.hit_tokens = True, data.num_computed_tokens
                for image in entry.outline.images:
                    image.covered = image.end <= data.num_computed_tokens
        traced = {}
        for name, entry in self.active.items():
            tokens = step.num_scheduled_tokens.get(name)
            if tokens and requests[name].num_computed_tokens - tokens < entry.images_end:
                traced[name] = entry.keys
        if traced or self.forget:
            setattr(step, TRACED, StepTraces(traced, tuple(self.forget)))
            self.forget.clear()

    def end(self, request: Request) -> None:
        """Notes what a request holds, before it is freed; of one that was aborted nothing is kept."""
        entry = self.active.get(request.request_id)
        if entry is None:
            return
        # A front end that finds a stop string aborts the request, for the engine knows none.
        params = request.sampling_params
        stopped = bool(params is not None and params.stop and request.num_output_tokens)
        failed = request.status in (RequestStatus.FINISHED_IGNORED, RequestStatus.FINISHED_ERROR)
        if failed or (request.status == RequestStatus.FINISHED_ABORTED and not stopped):
            self._drop(entry.outline.id)
            return
        del self.active[request.request_id]
        entry.finished = True
        entry.outline.segments = self._segments(request, entry.plan)
        if request.num_preemptions:
            # It may have come back behind an image that others had cached meanwhile, which nobody reduced for it.
            for image in entry.outline.images:
                image.covered = True

    def take(self, name: str) -> Entry | None:
        """A request that has ended, which is forgotten here; None where there is none."""
        entry = self.held.get(name)
        if entry is None or not entry.finished:
            return None
        del self.held[name]
        self.size -= entry.size
        return entry

    def _drop(self, name: str) -> None:
        entry = self.held.pop(name)
        self.active.pop(entry.request_id, None)
        self.forget.append(entry.request_id)
        self.size -= entry.size

    def _entry(self, name: str, request: Request) -> Entry:
        profile, params = self.planner.profile, request.sampling_params
        features = sorted(
            (feature for feature in request.mm_features or () if feature.modality == "image"),
            key=lambda feature: feature.mm_position.offset,
        )
        prompt = request.prompt_token_ids or ()
        held = plan = plan_of_features(self.planner, prompt, request.mm_features, params)
        spans = plan.spans
        if len(spans) != len(features):  # nothing is planned where prompt log-probabilities are asked for
            plan, spans = RequestPlan(len(prompt), (), ()), tuple(image_spans(features))
        images, keys = [], []
        for i, (feature, span) in enumerate(zip(features, spans, strict=True)):
            kept = plan.kept[i] if plan.kept else (span.length,) * profile.num_segments
            counts = [tokens - len(span.text) for tokens in kept]
            total = size_of(self.planner, feature) if profile.before is not None else span.visual
            grid = self.grid(feature.data, total + len(span.text))
            images.append(
                ImageOutline(
                    tokens=total,
                    rows=grid.rows,
                    columns=grid.columns,
                    cropped=grid.cropped,
                    tiles=grid.tiles,
                    counts=counts,
                    end=span.end,
                )
            )
            if profile.before is not None:
                keys.append((_fingerprint(feature), span.length, total))
        extra = (params.extra_args or {}) if params is not None else {}
        outline = Outline(
            id=name,
            budget=str(extra[REQUEST_FIELD]) if REQUEST_FIELD in extra else None,
            selects=profile.before is not None,
            layers=list(profile.layers),
            images=images,
        )
        size = sum(_IMAGE_BYTES + _BYTES * len(profile.reducers) * image.tokens for image in images)
        return Entry(request.request_id, outline, tuple(keys), held, spans[-1].end if spans else 0, size)

    def _segments(self, request: Request, plan: RequestPlan) -> list[SegmentTrace]:
        profile, name = self.planner.profile, request.request_id
        blocks = [0] * profile.num_segments
        for manager in self.managers:
            blocks[getattr(manager.kv_cache_spec, "segment", 0)] += len(manager.req_to_blocks.get(name, ()))
        starts = [0, *(layer + 1 for layer in profile.layers)]
        return [
            SegmentTrace(
                layer_from=start, kv_blocks=blocks[s], tokens=plan.segment_length(s, request.num_computed_tokens)
            )
            for s, start in enumerate(starts)
        ]


def parent_of(request_id: str) -> str:
    """The engine's name of the request that one of several answers (n > 1) belongs to: vLLM puts a number in front."""
    number, mark, rest = request_id.partition("_")
    return rest if mark and number.isdecimal() else request_id


def _fingerprint(feature: Any) -> int:
    """Of an image; :data:`_NO_KEY` where its data are in shared memory, which only the worker reads."""
    data = feature.data
    return int(data[FINGERPRINT].data) if data is not None and FINGERPRINT in data else _NO_KEY


def _answer_calls() -> None:
    """Gives the engine core a method that front ends can call: vLLM's own calls reach workers, and no scheduler.

    Why safe: a method of a new name. Can go when a plugin may answer calls in the engine core.
    """
    EngineCore.eos_trace = eos_trace  # type: ignore[attr-defined]


def eos_trace(core: Any, name: str) -> dict[str, Any] | None:
    """What scheduler and workers hold of a request that has ended, as plain data; it is forgotten by all of them.

    Args:
        core: the engine core.
        name: id of the response.
    """
    book: TraceBook | None = getattr(core.scheduler, "traces", None)
    entry = None if book is None else book.take(name)
    if entry is None:
        return None
    answers = core.collective_rpc("eos_trace", args=(entry.request_id, list(entry.keys)))
    records = [record for answer in answers for record in answer]
    return {"outline": entry.outline.model_dump(), "records": records}
