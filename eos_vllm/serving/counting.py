"""Schedulers of a profile that reduces before the decoder alone: vLLM's own, and counts for ``/metrics``."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from eos_vllm.core.plan import Planner
from eos_vllm.serving.by_budget import BudgetCounts
from eos_vllm.serving.image_processor import TOTAL
from eos_vllm.serving.metrics import Counters, pack_stats
from eos_vllm.serving.options import has_page, planner_of
from eos_vllm.serving.report import short_report

logger = init_logger("vllm.eos")


def count_selected(
    counters: Counters,
    step: SchedulerOutput,
    planner: Planner,
    counted: set[str],
    by_budget: BudgetCounts | None = None,
) -> None:
    """Adds the images of requests that are new in a step, not under a cache hit, and reduced.

    ``counted`` holds the requests that are under way: one that comes back after a preemption may look new. With
    ``by_budget`` nothing else counts the images.
    """
    counted -= step.finished_req_ids
    for request in step.scheduled_new_reqs:
        if request.req_id in counted:
            continue
        counted.add(request.req_id)
        images = kept = 0
        for feature in request.mm_features:
            place, total = feature.mm_position, size_of(planner, feature)
            if feature.modality == "image" and request.num_computed_tokens <= place.offset and place.length < total:
                counters.count_tokens(0, total, place.length)
                images, kept = images + 1, kept + place.length
        if by_budget is not None and images:
            counters.images += images
            by_budget.images(request.sampling_params, images, kept)


def size_of(planner: Planner, feature: Any) -> int:
    """Visual tokens of an image before any reducer; where its data are elsewhere, those that it has in the prompt."""
    if (total := planner.profile.model.visual_tokens) is not None:
        return total
    data = feature.data
    return int(data[TOTAL].data) if data is not None and TOTAL in data else feature.mm_position.length


class CountingSchedulerMixin(Scheduler):
    """What both of vLLM's schedulers gain: nothing but counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        planner = planner_of(self.vllm_config)
        if planner is None:
            raise RuntimeError("the eos scheduler was chosen, but additional_config holds no eos profile")
        self.planner = planner
        self.counters = Counters(1)
        self.by_budget = BudgetCounts(self.counters, planner)
        self._counted: set[str] = set()
        self.traces: Any = None
        if has_page(self.vllm_config):
            from eos_vllm.serving.trace_book import TraceBook  # which counts by this module

            self.traces = TraceBook(planner, self.vllm_config, self.kv_cache_manager.coordinator.single_type_managers)
        logger.info("eos: %s", short_report(planner))

    def add_request(self, request: Request) -> None:
        """As vLLM's; counts requests with images by budget."""
        if request.mm_features and request.request_id not in self.requests:
            self.by_budget.request(request.sampling_params)
        if self.traces is not None and request.request_id not in self.requests:
            self.traces.add(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; counts the images of new requests."""
        step = super().schedule(*args, **kwargs)
        if step.scheduled_new_reqs:
            count_selected(self.counters, step, self.planner, self._counted, self.by_budget)
        if self.traces is not None and self.traces.is_busy:
            self.traces.announce(step, self.requests)
        return step

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; a trace of the request notes what it holds."""
        if self.traces is not None and self.traces.active:
            self.traces.end(request)
        return super()._free_request(request, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with the counts of this plugin on board (see :mod:`eos_vllm.serving.metrics`)."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            pack_stats(stats, self.counters, [])
        return stats


class CountingScheduler(CountingSchedulerMixin):
    """vLLM's scheduler with counts."""


class CountingAsyncScheduler(CountingSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with counts."""
