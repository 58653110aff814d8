"""The V1 model runner's part: tell the batch state what is in the step, and prove the set-up once.

Symptom without it: metadata builders know lengths but not which request, so no segment could know what is gone.
Cause: vLLM's V1 runner gives builders no request ids and has no hook before it builds metadata.
Why safe: both wraps call vLLM's method with the very arguments, and do nothing where the model carries no profile.
Can go when the V2 runner, which has ``ModelState.prepare_attn`` for this, is the only one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.block_table import SlotMappingMode
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from eos_vllm.serving.attention import PADDING_SLOT
from eos_vllm.serving.batch import BatchRow
from eos_vllm.serving.cached_keys import prove_key_reading
from eos_vllm.serving.options import reads_cached_keys
from eos_vllm.serving.proof import prove_worker
from eos_vllm.serving.requests import plan_of_features


def hook_v1_runner() -> None:
    """Wraps two methods of ``GPUModelRunner`` once per process; called when a model with a profile is built."""
    if getattr(GPUModelRunner, "eos_hooked", False):
        return
    GPUModelRunner.eos_hooked = True  # type: ignore[attr-defined]
    build, initialize = GPUModelRunner._build_attention_metadata, GPUModelRunner.initialize_kv_cache

    scheduled_of = argument_reader(build, "num_scheduled_tokens")

    @functools.wraps(build)
    def build_with_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        if reduction := reduction_of(self):
            reduction.batch.begin(_rows(self, reduction.planner, scheduled_of((self, *args), kwargs)))
        return build(self, *args, **kwargs)

    @functools.wraps(initialize)
    def initialize_with_proof(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(self, kv_cache_config, *args, **kwargs)
        if reduction := reduction_of(self):
            prove_worker(reduction, self.kv_cache_config, self.max_model_len)
            if reads_cached_keys(self.vllm_config):
                prove_key_reading(reduction.attention[0])
            skip_slot_mappings(self.input_batch)
        return result

    GPUModelRunner._build_attention_metadata = build_with_rows  # type: ignore[method-assign]
    GPUModelRunner.initialize_kv_cache = initialize_with_proof  # type: ignore[method-assign]


def argument_reader(function: Callable[..., Any], name: str) -> Callable[[tuple, dict[str, Any]], Any]:
    """How to find an argument in a call of ``function``, by keyword or by position; None where it is left out.

    Raises:
        RuntimeError: the function has no such parameter. Every real step would be taken for one of vLLM's dummy runs.
    """
    names = list(inspect.signature(function).parameters)
    if name not in names:
        raise RuntimeError(f"vLLM's {function.__name__} takes no {name}: this version of vLLM is not supported")
    place = names.index(name)

    def read(args: tuple, kwargs: dict[str, Any]) -> Any:
        return args[place] if len(args) > place else kwargs.get(name)

    return read


def reduction_of(runner: Any) -> Any:
    """The :class:`eos_vllm.serving.model.Reduction` of the runner's model, None without a profile."""
    return getattr(runner.get_model(), "eos", None)


def skip_slot_mappings(input_batch: Any) -> None:
    """Spares vLLM the slots that it computes per KV group and step, and which nothing reads: segments have their own.

    What is left in vLLM's buffers is padding, so that whoever read them all the same would write nowhere.
    """
    for table in input_batch.block_table.block_tables:
        table.slot_mapping_mode = SlotMappingMode.NONE
        table.slot_mapping.gpu.fill_(PADDING_SLOT)


def _rows(runner: Any, planner: Any, scheduled: dict[str, int] | None) -> list[BatchRow] | None:
    if scheduled is None:  # vLLM's dummy runs
        return None
    batch, states = runner.input_batch, runner.requests
    computed = batch.num_computed_tokens_cpu
    rows = []
    for i, request_id in enumerate(batch.req_ids):
        state = states[request_id]
        try:
            plan = state.eos_plan
        except AttributeError:
            plan = plan_of_features(planner, state.prompt_token_ids or (), state.mm_features, state.sampling_params)
            plan = state.eos_plan = plan if plan.reduces else None
        rows.append(BatchRow(request_id, plan, int(computed[i]), scheduled[request_id]))
    return rows
