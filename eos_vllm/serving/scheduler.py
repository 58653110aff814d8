"""Schedulers that know each request's plan, so that the KV managers allocate by it (design 5.3)."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.kv_cache import SegmentManager
from eos_vllm.serving.metrics import Counters, pack_stats
from eos_vllm.serving.options import planner_of
from eos_vllm.serving.proof import prove_allocation
from eos_vllm.serving.report import startup_report
from eos_vllm.serving.requests import plan_of_features

logger = init_logger("vllm.eos")


class EosSchedulerMixin(Scheduler):
    """What both scheduler classes of vLLM gain: plans, whole image prompts, and counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        planner = planner_of(self.vllm_config)
        if planner is None:
            raise RuntimeError("the eos scheduler was chosen, but additional_config holds no eos profile")
        self.planner = planner
        self.plans: dict[str, RequestPlan] = {}
        self.segment_managers: list[SegmentManager] = []
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if not isinstance(manager, SegmentManager):
                raise RuntimeError(f"KV group {manager.kv_cache_group_id} is managed by {type(manager).__name__}")
            manager.plans = self.plans
            self.segment_managers.append(manager)
        prove_allocation(self.kv_cache_config, planner, self.max_model_len, self.kv_cache_manager.coordinator)
        self.counters = Counters(planner.profile.num_segments - 1)
        logger.info("eos: %s", startup_report(planner, self.vllm_config, self.kv_cache_config))

    def add_request(self, request: Request) -> None:
        """Plans the request before anything is allocated for it."""
        if request.request_id not in self.requests and request.mm_features:
            plan = plan_of_features(
                self.planner, request.num_prompt_tokens, request.mm_features, request.sampling_params
            )
            if plan.reduces:
                self.plans[request.request_id] = plan
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; counts the prompts that it admits."""
        output = super().schedule(*args, **kwargs)
        if self.plans:
            for request_id in (
                *(data.req_id for data in output.scheduled_new_reqs),
                *output.scheduled_cached_reqs.resumed_req_ids,
            ):
                if plan := self.plans.get(request_id):
                    self.counters.count(plan)
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with the counts of this plugin on board (see :mod:`eos_vllm.serving.metrics`)."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            pack_stats(stats, self.counters, self.blocks_held())
        return stats

    def blocks_held(self) -> list[int]:
        """KV blocks that requests hold now, per segment."""
        held = [0] * self.planner.profile.num_segments
        for manager in self.segment_managers:
            held[manager.kv_cache_spec.segment] += manager.blocks_held
        return held

    def _try_schedule_encoder_inputs(  # type: ignore[override]
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        **kwargs: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Schedules all images of a reduced prompt or none: where the encoder has no room, the prompt waits whole."""
        result = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        if result[1] < num_new_tokens and request.request_id in self.plans:
            # Asking took references to images that are cached already; kept while waiting, they could starve others.
            self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return result

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.plans.pop(request.request_id, None)


class EosScheduler(EosSchedulerMixin):
    """vLLM's scheduler with plans."""


class EosAsyncScheduler(EosSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with plans."""
