"""Schedulers that know each request's plan, so that the KV managers allocate by it."""

import itertools
import time
from typing import Any

from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.sched import output
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from eos_vllm.core.budget import REQUEST_FIELD, TEXT_TOKENS, plain
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.serving.by_budget import BudgetCounts
from eos_vllm.serving.contract import check_contract
from eos_vllm.serving.coordinator import adopt
from eos_vllm.serving.counting import count_selected
from eos_vllm.serving.elastic import Elastic, least_of, levels
from eos_vllm.serving.kv_cache import planned_blocks, prefilled
from eos_vllm.serving.metrics import Counters, pack_stats
from eos_vllm.serving.options import has_page, planner_of
from eos_vllm.serving.prefix_cache import RequestKeys
from eos_vllm.serving.proof import prove_allocation
from eos_vllm.serving.report import startup_report
from eos_vllm.serving.requests import image_spans, plan_of_features
from eos_vllm.serving.trace_book import TraceBook
from eos_vllm.serving.watch import PLANNED

logger = init_logger("vllm.eos")
# On a scheduler's output: when it was made, and what it prefills.
_BEGAN = "eos_began"


class EosSchedulerMixin(Scheduler):
    """What both scheduler classes of vLLM gain: plans, whole image prompts, and counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_contract("engine core")
        super().__init__(*args, **kwargs)
        planner = planner_of(self.vllm_config)
        if planner is None:
            raise RuntimeError("the eos scheduler was chosen, but additional_config holds no eos profile")
        self.planner = planner
        self.plans: dict[str, RequestPlan] = {}
        self.keys: dict[str, RequestKeys] = {}
        self.hasher = get_hash_fn_by_name(self.cache_config.prefix_caching_hash_algo)
        self.coordinator = adopt(self.kv_cache_manager.coordinator, self.plans, self.keys)
        if self.cache_config.enable_prefix_caching:
            keep_covered_images()
        prove_allocation(self.kv_cache_config, planner, self.max_model_len, self.coordinator)
        self.counters = self.coordinator.counters = Counters(len(planner.profile.reducers))
        self.by_budget = BudgetCounts(self.counters, planner)
        self._counted: set[str] = set()
        self._selects = planner.profile.before is not None
        self._unreduced: set[str] = set()  # requests whose images are not all in
        self.chosen: dict[str, int | float | str] = {}
        self._stepped = 0.0  # when the last step ended
        self._weights: dict[str, float] = {}  # of requests with images, where budgets follow the load
        self.elastic = elastic_of(planner, self.kv_cache_config)
        self.traces: TraceBook | None = None
        if has_page(self.vllm_config):
            self.traces = TraceBook(planner, self.vllm_config, self.coordinator.single_type_managers)
        logger.info("eos: %s", startup_report(planner, self.vllm_config, self.kv_cache_config))

    def add_request(self, request: Request) -> None:
        """Plans the request before anything is allocated for it."""
        name = request.request_id
        if name not in self.requests:
            plan = None
            if self.elastic is not None and request.mm_features:
                self._choose_budget(self.elastic, request)
            if request.mm_features:
                plan = plan_of_features(
                    self.planner, request.prompt_token_ids or (), request.mm_features, request.sampling_params
                )
                plan = plan if plan.reduces else None
                self.by_budget.request(request.sampling_params)
            if self.elastic is not None and request.mm_features and name not in self.chosen:
                blocks = sum(planned_blocks(self.kv_cache_config, plan, request.num_prompt_tokens))
                self._weights[name] = blocks / self.elastic.blocks[0]
                alone = not (self.waiting or self.running)
                self.elastic.pinned(time.monotonic(), blocks, self._images_of(request), alone)
            if plan is not None:
                self.plans[name] = plan
                self._unreduced.add(name)
            if self.cache_config.enable_prefix_caching:
                self.keys[name] = RequestKeys(request, plan, self.block_size, self.hasher, self.planner.block > 1)
            if self.traces is not None:
                self.traces.add(request)
        super().add_request(request)

    def _choose_budget(self, elastic: Elastic, request: Request) -> None:
        """Writes a budget into a request that names none; the worker reads it there."""
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        if params is None or (extra and REQUEST_FIELD in extra):
            return
        unready = (r for r in self.running if r.num_computed_tokens < r.num_prompt_tokens)
        behind = sum(self._weights.get(r.request_id, 0.0) for r in itertools.chain(self.waiting, unready))
        weight = self._weights[request.request_id] = self._weight(elastic, request)
        alone, images = not (self.waiting or self.running), self._images_of(request)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        try:
            least = least_of(extra, self.planner)
        except BudgetError as e:  # past the front end's check; an exception here would end the engine for everybody
            logger.warning("eos: %s; the request has no floor of its own", e)
            least = None
        chosen = elastic.choose(time.monotonic(), behind, free, images, least, alone, weight)
        place = {elastic.levels[0]: "ceiling", elastic.levels[-1]: "floor"}.get(chosen, "between")
        self.counters.add("elastic", place, 1)
        budget = plain(chosen)
        params.extra_args = {**(extra or {}), REQUEST_FIELD: budget}
        self.chosen[request.request_id] = budget

    def _weight(self, elastic: Elastic, request: Request) -> float:
        """KV blocks of the request at the ceiling, over those of one with a single image of the planned size."""
        prompt, spans = request.prompt_token_ids or (), image_spans(request.mm_features)
        try:
            plan: RequestPlan | None = self.planner.plan(prompt, spans, elastic.levels[0])
        except BudgetError:  # images that it does not fit keep all of their tokens
            plan = None
        return sum(planned_blocks(self.kv_cache_config, plan, request.num_prompt_tokens)) / elastic.blocks[0]

    def _images_of(self, request: Request) -> list[str]:
        """Its images by name, where one that comes again may be cached."""
        if not self.cache_config.enable_prefix_caching:
            return []
        return [feature.identifier for feature in request.mm_features if feature.modality == "image"]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; tells the client which budget was chosen, in the response's ``kv_transfer_params``."""
        if self.traces is not None and self.traces.active:
            self.traces.end(request)
        kv_params, *others = super()._free_request(request, *args, **kwargs)
        if (budget := self.chosen.pop(request.request_id, None)) is not None:
            kv_params = {**(kv_params or {}), REQUEST_FIELD: budget}
        return (kv_params, *others)

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; tells the coordinator whose blocks it looks for."""
        self.coordinator.looked_up = self.keys.get(request.request_id)
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; counts the images that the step reduces."""
        self.coordinator.scheduling = True
        try:
            step = super().schedule(*args, **kwargs)
        finally:
            self.coordinator.scheduling = False
        if self._selects:
            count_selected(self.counters, step, self.planner, self._counted)
        if self.plans and (resumed := step.scheduled_cached_reqs.resumed_req_ids):
            self._unreduced.update(name for name in resumed if name in self.plans)
        planned = None
        for name in self._unreduced.intersection(step.num_scheduled_tokens):
            plan, request = self.plans[name], self.requests[name]
            end = request.num_computed_tokens
            if images := plan.images_in(end - step.num_scheduled_tokens[name], end):
                planned = planned or Counters(len(self.planner.profile.reducers))
                planned.count(plan, images)
                self.by_budget.planned(request.sampling_params, plan, images)
            if end >= plan.images_end:
                self._unreduced.discard(name)
        if planned is not None:
            self.counters.join(planned)
            setattr(step, PLANNED, planned)  # travels to the workers, who compare what they did
        if self.elastic is not None:
            prefills = prefilled(step, self.requests, self.plans, self.kv_cache_config)
            setattr(step, _BEGAN, (time.monotonic(), prefills))
        if self.traces is not None and self.traces.is_busy:
            self.traces.announce(step, self.requests)
        return step

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; where budgets follow the load, learns from how long the step took."""
        if self.elastic is not None and (noted := getattr(scheduler_output, _BEGAN, None)) is not None:
            (began, blocks), now = noted, time.monotonic()
            # A step that was scheduled while the one before ran begins where that ended.
            seconds, self._stepped = now - max(began, self._stepped), now
            if blocks is not None and scheduler_output.num_scheduled_tokens:
                self.elastic.load.stepped(seconds, *blocks)
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with the counts of this plugin on board (see :mod:`eos_vllm.serving.metrics`)."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            pack_stats(stats, self.counters, self.blocks_held())
        return stats

    def blocks_held(self) -> list[int]:
        """KV blocks that requests hold now, per segment."""
        held = [0] * self.planner.profile.num_segments
        for manager in self.coordinator.single_type_managers:
            held[manager.kv_cache_spec.segment] += manager.blocks_held
        return held

    def _try_schedule_encoder_inputs(  # type: ignore[override]
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Ends no step within an image and its window; where encoder or step have no room for both, they wait whole."""
        plan = self.plans.get(request.request_id)
        if plan is None or num_computed_tokens >= plan.images_end:
            return super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
            )
        wanted = num_new_tokens
        while num_new_tokens := self._whole_spans(plan, num_computed_tokens, num_new_tokens, wanted):
            result = super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
            )
            if result[1] == num_new_tokens:
                return result
            # Asking took references to images that are cached already; kept while waiting, they could starve others.
            self.encoder_cache_manager.free(request)
            num_new_tokens = result[1]
        return [], 0, encoder_compute_budget, [], []

    def _whole_spans(self, plan: RequestPlan, computed: int, tokens: int, wanted: int) -> int:
        """Tokens of a step that cuts no span. A few in front of an image wait for it, if both fit into one step."""
        if not self.scheduler_config.enable_chunked_prefill and tokens < wanted:
            return 0
        clipped = plan.clip(computed, tokens)
        if not self.scheduler_config.enable_chunked_prefill and clipped < wanted:
            return 0
        if 0 < clipped < min(tokens, self.block_size):
            span = next(span for span in plan.atomic_spans if span.start >= computed)
            if span.end - computed <= self.max_num_scheduled_tokens:
                return 0
        return clipped

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.plans.pop(request.request_id, None)
        self._weights.pop(request.request_id, None)
        self.keys.pop(request.request_id, None)
        self._unreduced.discard(request.request_id)


def elastic_of(planner: Planner, kv_cache_config: KVCacheConfig) -> Elastic | None:
    """The controller that the options ask for, with what an image costs at each of its budgets."""
    if planner.elastic is None:
        return None
    budgets = levels(planner, *planner.elastic)
    tokens = planner.visual_tokens + TEXT_TOKENS
    span = ImageSpan(0, planner.visual_tokens)
    plans = [planner.plan(planner.trial_prompt(tokens, span), [span], budget) for budget in budgets]
    return Elastic(budgets, [sum(planned_blocks(kv_cache_config, plan, tokens)) for plan in plans])


def keep_covered_images() -> None:
    """Leaves the pixels of images under a cache hit in what the worker is sent.

    Symptom: stock vLLM's V1 worker dies of "Encoder cache miss" when a request under a hit is preempted and its blocks
    and encoder output are evicted before it resumes. Cause: the pixels are stripped before the worker sees them, and a
    resumed request is not sent again. Why safe: they are sent as without a hit. Can go when V1 resends features.
    """
    output.strip_covered_mm_data = lambda features, *_, **__: features


class EosScheduler(EosSchedulerMixin):
    """vLLM's scheduler with plans."""


class EosAsyncScheduler(EosSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with plans."""
