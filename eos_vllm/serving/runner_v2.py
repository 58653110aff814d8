"""The V2 model runner's part, through its own extension point: a model state.

Written against vLLM 0.32; not yet proven, for the V2 runner needs a GPU (or Triton for CPUs). ``--eos-profile``
therefore selects V1, unless ``VLLM_USE_V2_MODEL_RUNNER=1`` is set.
"""

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.batch import BatchRow
from eos_vllm.serving.cached_keys import prove_key_reading
from eos_vllm.serving.options import reads_cached_keys
from eos_vllm.serving.proof import prove_worker
from eos_vllm.serving.requests import plan_of_features


class EosModelState(DefaultModelState):
    """vLLM's default state, which also tells the reduction what is in each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, RequestPlan | None] = {}
        self.reduction: Any = getattr(self.model, "eos", None)

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
            self.plans[new_req_data.req_id] = plan if plan.reduces else None

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.plans.pop(req_id, None)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Proves the set-up once the KV cache is there."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.reduction is not None:
            prove_worker(self.reduction, kv_cache_config, self.max_model_len)
            if reads_cached_keys(self.vllm_config):
                prove_key_reading(self.reduction.attention[0])

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tells the batch state what is in the step before vLLM builds metadata."""
        if self.reduction is not None:
            self.reduction.batch.begin(self._rows(input_batch))
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _rows(self, batch: InputBatch) -> list[BatchRow] | None:
        names = batch.req_ids[: batch.num_reqs]
        if any(name not in self.plans for name in names):  # vLLM's dummy batches have made-up names
            return None
        return [
            BatchRow(name, self.plans[name], int(computed), int(scheduled))
            for name, computed, scheduled in zip(
                names, batch.num_computed_tokens_np, batch.num_scheduled_tokens, strict=False
            )
        ]
