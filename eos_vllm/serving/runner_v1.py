"""The V1 model runner's part: tell the batch state what is in the step, and prove and rehearse the set-up once.

Symptom without it: metadata builders know lengths but not which request, so no segment could know what is gone.
Cause: vLLM's V1 runner gives builders no request ids and has no hook before it builds metadata.
Why safe: the wraps call vLLM's method with the very arguments, and do nothing where the model carries no profile.
Can go when the V2 runner, which has ``ModelState.prepare_attn`` for this, is the only one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.block_table import SlotMappingMode
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from eos_vllm.serving.attention import PADDING_SLOT
from eos_vllm.serving.batch import StepEntry
from eos_vllm.serving.cached_keys import prove_key_reading
from eos_vllm.serving.options import reads_cached_keys
from eos_vllm.serving.proof import prove_worker
from eos_vllm.serving.rehearsal import rehearse, rehearse_memory
from eos_vllm.serving.requests import plan_of_features
from eos_vllm.serving.watch import follow_plans


def hook_v1_runner() -> None:
    """Wraps four methods of ``GPUModelRunner`` once per process; called when a model with a profile is built."""
    if getattr(GPUModelRunner, "eos_hooked", False):
        return
    GPUModelRunner.eos_hooked = True  # type: ignore[attr-defined]
    build, initialize = GPUModelRunner._build_attention_metadata, GPUModelRunner.initialize_kv_cache
    profile = GPUModelRunner.profile_run

    scheduled_of = argument_reader(build, "num_scheduled_tokens")

    @functools.wraps(build)
    def build_with_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        if reduction := reduction_of(self):
            _begin(self, reduction, scheduled_of((self, *args), kwargs))
        return build(self, *args, **kwargs)

    @functools.wraps(initialize)
    def initialize_with_proof(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        if before := getattr(self.get_model(), "eos_before", None):
            before.rehearse()
        if not (reduction := reduction_of(self)):
            return initialize(self, kv_cache_config, *args, **kwargs)
        reduction.batch.allocate()
        result = initialize(self, kv_cache_config, *args, **kwargs)
        if reduction.layers.start and self.intermediate_tensors is None:
            # vLLM makes them in its profiling run, which its CPU worker leaves out (eager, KV bytes given).
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        prove_worker(reduction, self.kv_cache_config, self.max_model_len)
        if reads_cached_keys(self.vllm_config):
            prove_key_reading(reduction.attention[reduction.layers.start])
        skip_slot_mappings(self.input_batch)
        rehearse(self, reduction, self.encoder_cache)
        return result

    @functools.wraps(profile)
    def profile_with_reduction(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = profile(self, *args, **kwargs)
        if reduction := reduction_of(self):
            rehearse_memory(self, reduction)
        return result

    GPUModelRunner._build_attention_metadata = build_with_rows  # type: ignore[method-assign]
    GPUModelRunner.initialize_kv_cache = initialize_with_proof  # type: ignore[method-assign]
    GPUModelRunner.profile_run = profile_with_reduction  # type: ignore[method-assign]
    follow_plans(GPUModelRunner)


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


def _begin(runner: Any, reduction: Any, scheduled: dict[str, int] | None) -> None:
    if scheduled is None:  # vLLM's dummy runs
        reduction.batch.begin(None)
        return
    names, computed = runner.input_batch.req_ids, runner.input_batch.num_computed_tokens_cpu
    states = list(map(runner.requests.__getitem__, names))
    if reduction.batch.goes_on(states, computed, sum(scheduled.values())):
        return
    rows = []
    for i, (name, state) in enumerate(zip(names, states, strict=True)):
        try:
            plan = state.eos_plan
        except AttributeError:
            plan = plan_of_features(
                reduction.planner, state.prompt_token_ids or (), state.mm_features, state.sampling_params
            )
            plan = state.eos_plan = plan if plan.reduces else None
        rows.append(StepEntry(name, plan, int(computed[i]), scheduled[name]))
    reduction.batch.begin(rows, states)
