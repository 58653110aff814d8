"""The V2 model runner's part: a model state, which is vLLM's own extension point, and the rehearsal.

The state tells the batch what is in each step. Two methods of the runner are wrapped beside it. Symptom without them:
no image is rehearsed, for a state knows no runner. Why safe: vLLM's methods are called with the very arguments. Can
go when a state may warm up. A third one is wrapped by :mod:`eos_vllm.serving.watch`.
"""

import functools
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.batch import StepEntry
from eos_vllm.serving.cached_keys import prove_key_reading
from eos_vllm.serving.options import reads_cached_keys
from eos_vllm.serving.proof import prove_worker
from eos_vllm.serving.rehearsal import rehearse, rehearse_memory
from eos_vllm.serving.requests import plan_of_features
from eos_vllm.serving.trace import follow_traces
from eos_vllm.serving.watch import follow_plans


@dataclass(frozen=True, eq=False)
class Planned:
    """A request's plan, None where it reduces nothing; one object for as long as the request is in the batch."""

    plan: RequestPlan | None


def hook_v2_runner() -> None:
    """Wraps three methods of the V2 ``GPUModelRunner`` once per process; called when a profile's model is built."""
    if getattr(GPUModelRunner, "eos_hooked", False):
        return
    GPUModelRunner.eos_hooked = True  # type: ignore[attr-defined]
    initialize, profile = GPUModelRunner.initialize_kv_cache, GPUModelRunner.profile_run

    @functools.wraps(initialize)
    def initialize_and_rehearse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before := self.get_model().eos_before:
            before.rehearse()
        result = initialize(self, *args, **kwargs)
        if reduction := self.get_model().eos:
            cache = self.encoder_cache  # the first stage's alone
            rehearse(self, reduction, {} if cache is None else cache.encoder_outputs)
        return result

    @functools.wraps(profile)
    def profile_with_reduction(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = profile(self, *args, **kwargs)
        if reduction := self.get_model().eos:
            rehearse_memory(self, reduction)
        return result

    GPUModelRunner.initialize_kv_cache = initialize_and_rehearse  # type: ignore[method-assign]
    GPUModelRunner.profile_run = profile_with_reduction  # type: ignore[method-assign]
    follow_plans(GPUModelRunner)


class EosModelState(DefaultModelState):
    """vLLM's default state, which also tells the reduction what is in each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hook_v2_runner()
        self.planned: dict[str, Planned] = {}
        self.reduction: Any = self.model.eos
        if self.model.eos_recorder is not None:
            follow_traces(GPUModelRunner)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Plans a request that is new, or that comes back after a preemption."""
        super().add_request(req_index, new_req_data)
        if self.reduction is not None:
            plan = plan_of_features(
                self.reduction.planner,
                new_req_data.prompt_token_ids or (),
                new_req_data.mm_features,
                new_req_data.sampling_params,
            )
            self.planned[new_req_data.req_id] = Planned(plan if plan.reduces else None)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.planned.pop(req_id, None)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Proves the set-up once the KV cache is there."""
        if self.reduction is not None:
            self.reduction.batch.allocate()
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.reduction is not None:
            prove_worker(self.reduction, kv_cache_config, self.max_model_len)
            if reads_cached_keys(self.vllm_config):
                prove_key_reading(self.reduction.attention[self.reduction.layers.start])

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tells the batch state what is in the step before vLLM builds metadata."""
        if self.reduction is not None:
            self._begin(input_batch)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _begin(self, batch: InputBatch) -> None:
        names = batch.req_ids[: batch.num_reqs]
        planned = list(map(self.planned.get, names))
        if not any(planned):  # vLLM's dummy batches have made-up names
            self.reduction.batch.begin(None)
            return
        if unknown := [name for name, plan in zip(names, planned, strict=True) if plan is None]:
            raise RuntimeError(f"eos: requests {unknown} are in a step, but were never added to the model state")
        computed, scheduled = batch.num_computed_tokens_np, batch.num_scheduled_tokens[: len(names)]
        if not self.reduction.batch.goes_on(planned, computed, int(scheduled.sum())):
            rows = [
                StepEntry(name, entry.plan, int(done), int(count))  # type: ignore[union-attr]
                for name, entry, done, count in zip(names, planned, computed, scheduled, strict=False)
            ]
            self.reduction.batch.begin(rows, planned)
