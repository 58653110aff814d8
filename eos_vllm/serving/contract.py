"""Everything of vLLM's insides that the reduction relies on, as one list, checked where it is used before a request is.

A name that moved would else be met by the first image, or be missed without a word. Each process checks its own part:
the front end where flags are parsed, the engine core in the scheduler, the worker in the model.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Process = Literal["front end", "elastic front end", "engine core", "worker"]
REMEDY = "install a version of vLLM that this eos-vllm supports (eos-vllm doctor), or leave out --eos-profile"
# What the reduction's metadata, slots and KV writes were written against; CPU_ATTN is the one that tests run.
ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


@dataclass(frozen=True)
class Takes:
    """A function that is wrapped, overridden or called: the parameters that we name or pass on."""

    where: str
    parameters: tuple[str, ...]

    def problems(self) -> Iterator[str]:
        """What is missing."""
        function = find(self.where)
        if not callable(function):
            yield f"{self.where} is gone"
            return
        found = inspect.signature(function).parameters
        for name in self.parameters:
            if name not in found:
                yield f"{self.where} has no parameter {name!r}"


@dataclass(frozen=True)
class Has:
    """A module or class, and the names in it that we use."""

    where: str
    names: tuple[str, ...]

    def problems(self) -> Iterator[str]:
        """What is missing."""
        owner = find(self.where)
        if owner is None:
            yield f"{self.where} is gone"
            return
        annotated = {name for cls in getattr(owner, "__mro__", ()) for name in getattr(cls, "__annotations__", {})}
        for name in self.names:
            if not hasattr(owner, name) and name not in annotated:
                yield f"{self.where} has no {name!r}"


@dataclass(frozen=True)
class Fields:
    """A dataclass whose fields we know all: one more might hold a length that we would have to reduce."""

    where: str
    names: tuple[str, ...]

    def problems(self) -> Iterator[str]:
        """What is missing, and what is new."""
        owner = find(self.where)
        if not dataclasses.is_dataclass(owner):
            yield f"{self.where} is no dataclass"
            return
        found = {field.name for field in dataclasses.fields(owner)}
        for name in sorted(set(self.names) - found):
            yield f"{self.where} has no field {name!r}"
        for name in sorted(found - set(self.names)):
            yield f"{self.where} has an unknown field {name!r}"


@dataclass(frozen=True)
class Overrides:
    """A class of ours over one of vLLM's: what it overrides takes whatever vLLM's takes, so that no call can fail."""

    where: str
    ours: str

    def methods(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, vLLM's and ours of each overridden method."""
        theirs, ours = find(self.where), find(self.ours)
        for name, method in vars(ours).items():
            if inspect.isfunction(method) and inspect.isfunction(getattr(theirs, name, None)) and name != "__init__":
                yield name, getattr(theirs, name), method

    def problems(self) -> Iterator[str]:
        """What ours does not take."""
        if find(self.where) is None:
            yield f"{self.where} is gone"
            return
        for name, theirs, ours in self.methods():
            taken = inspect.signature(ours).parameters
            if {p.kind for p in taken.values()} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
                continue
            for parameter in inspect.signature(theirs).parameters:
                if parameter not in taken:
                    yield f"{self.where}.{name} has an unknown parameter {parameter!r}"


Reliance = Takes | Has | Fields | Overrides
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_LLAVA = "vllm.model_executor.models.llava"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
_ATTENTION = "vllm.model_executor.layers.attention:Attention"

RELIANCES: dict[Process, tuple[Reliance, ...]] = {
    "front end": (
        Takes("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
        Takes("vllm.v1.engine.input_processor:InputProcessor.process_inputs", ("request_id", "prompt", "params")),
        Takes("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("self", "request")),
        Takes("vllm.entrypoints.generate.base.serving:GenerateBaseServing.__init__", ("engine_client",)),
        Has("vllm.engine.protocol:EngineClient", ("vllm_config",)),
        Takes("vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search", ("prompts",)),
        Takes("vllm.renderers.chat_utils:has_non_text_content", ("messages",)),
        Takes("vllm.v1.metrics.loggers:StatLoggerManager.__init__", ("vllm_config",)),
        Takes(
            "vllm.v1.metrics.loggers:StatLoggerManager.record",
            ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        ),
        Takes("vllm.v1.metrics.loggers:StatLoggerManager.log", ("self",)),
        Takes("vllm.plugins:load_endpoint_plugins", ("supported_tasks",)),
        Takes("vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.verify_token", ("headers",)),
        Takes("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method",)),
        Takes("vllm.v1.engine.async_llm:AsyncLLM._add_request", ("request",)),
        Takes("vllm.v1.engine.async_llm:AsyncLLM.get_num_queued_tokens", ("self",)),
        Takes("vllm.v1.engine.async_llm:AsyncLLM.check_admission", ("self", "n", "request_id")),
        Has("vllm.config.scheduler:SchedulerConfig", ("max_num_queued_tokens",)),
        Takes("vllm.v1.kv_cache_interface:get_kv_quant_mode", ("kv_cache_dtype",)),
        Has("vllm.config:CUDAGraphMode", ("FULL", "FULL_DECODE_ONLY")),
        Has("vllm.config:CompilationMode", ("STOCK_TORCH_COMPILE",)),
        Takes("vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled", ()),
        Takes("vllm.entrypoints.common.offline:OfflineInferenceMixin._render_and_add_requests", ("prompts", "params")),
        Takes("vllm.renderers.online_renderer:validate_request_mm_kwargs", ("mm_processor_kwargs",)),
        Has("vllm.multimodal.processing.inputs:ProcessorInputs", ("mm_data_items", "hf_processor_mm_kwargs")),
        Takes(f"{_LLAVA}:_build_llava_or_pixtral_hf_processor", ("info", "dummy_inputs")),
        Overrides(f"{_LLAVA}:LlavaMultiModalProcessor", "eos_vllm.serving.image_processor:EosProcessorMixin"),
        Has("vllm.multimodal.processing:PromptReplacement", ("modality", "replacement")),
        Has("vllm.multimodal:MULTIMODAL_REGISTRY", ("get_processing_info",)),
    ),
    "elastic front end": (Takes(f"{_CHAT}.chat_completion_stream_generator", ("self", "result_generator")),),
    "engine core": (
        Takes(f"{_SCHEDULER}.schedule", ("self",)),
        Takes(f"{_SCHEDULER}.add_request", ("self", "request")),
        Takes(f"{_SCHEDULER}._free_blocks", ("self", "request")),
        Takes(f"{_SCHEDULER}._free_request", ("self", "request")),
        Takes(f"{_SCHEDULER}._get_local_prefix_cache_hit", ("self", "request")),
        Takes(
            f"{_SCHEDULER}._try_schedule_encoder_inputs",
            ("request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget"),
        ),
        Takes(f"{_SCHEDULER}.make_stats", ("self",)),
        Takes(f"{_SCHEDULER}.update_from_output", ("self", "scheduler_output")),
        Has("vllm.v1.core.sched.output:SchedulerOutput", ("num_scheduled_tokens", "total_num_scheduled_tokens")),
        Takes("vllm.v1.engine.core:EngineCore.collective_rpc", ("method", "args")),
        Has("vllm.v1.request:RequestStatus", ("FINISHED_ABORTED", "FINISHED_IGNORED", "FINISHED_ERROR")),
        Has("vllm.v1.core.sched.output:NewRequestData", ("req_id", "num_computed_tokens")),
        Takes("vllm.v1.core.encoder_cache_manager:EncoderCacheManager.free", ("self", "request")),
        Has("vllm.v1.core.sched.output", ("strip_covered_mm_data",)),
        Fields("vllm.v1.metrics.stats:SchedulerStats", (
            "num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "num_kv_fetch_reqs_by_stage",
            "step_counter", "current_wave", "kv_cache_usage", "iteration_details", "prefix_cache_stats",
            "connector_prefix_cache_stats", "kv_cache_eviction_events", "spec_decoding_stats", "kv_connector_stats",
            "ec_connector_stats", "waiting_lora_adapters", "running_lora_adapters", "cudagraph_stats", "perf_stats",
        )),
        Takes(f"{_COORDINATOR}.get_num_blocks_to_allocate", ("request_id", "num_tokens")),
        Takes(
            f"{_COORDINATOR}.allocate_new_computed_blocks",
            ("request_id", "new_computed_blocks", "num_local_computed_tokens"),
        ),
        Takes(f"{_COORDINATOR}.allocate_new_blocks", ("request_id", "num_tokens")),
        Takes(f"{_COORDINATOR}.cache_blocks", ("request", "num_computed_tokens")),
        Takes(f"{_COORDINATOR}.find_longest_cache_hit", ("block_hashes", "max_cache_hit_length")),
        Takes(f"{_COORDINATOR}.remove_skipped_blocks", ("self",)),
        Takes(f"{_COORDINATOR}.free", ("request_id",)),
        Takes(f"{_COORDINATOR}.pop_blocks_for_free", ("request_id",)),
        Takes(f"{_COORDINATOR}.get_num_cacheable_tokens", ("num_computed_tokens", "kv_cache_group_id")),
        Takes(
            f"{_MANAGER}.get_num_blocks_to_allocate",
            ("request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens"),
        ),
        Takes(
            f"{_MANAGER}.add_local_computed_blocks",
            ("request_id", "new_computed_blocks", "num_local_computed_tokens", "num_external_computed_tokens"),
        ),
        Takes(f"{_MANAGER}.allocate_new_blocks", ("request_id", "num_tokens", "num_tokens_main_model")),
        Takes(f"{_MANAGER}.pop_blocks_for_free", ("request_id",)),
        Takes(f"{_MANAGER}.cache_blocks", ("request", "num_tokens")),
        Takes("vllm.v1.core.block_pool:BlockPool._insert_block_hash", ("block", "num_tokens")),
        Takes("vllm.v1.core.block_pool:BlockPool.get_cached_block", ("block_hash", "kv_cache_group_ids")),
        Takes("vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys", ("request",)),
        Takes("vllm.v1.core.kv_cache_utils:hash_block_tokens", ()),
        Has("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry", ("_ensure_registered", "register")),
        Overrides(_SCHEDULER, "eos_vllm.serving.scheduler:EosSchedulerMixin"),
        Overrides(_COORDINATOR, "eos_vllm.serving.coordinator:SegmentCoordinator"),
        Overrides(_MANAGER, "eos_vllm.serving.kv_cache:SegmentManager"),
    ),
    "worker": (
        Takes(f"{_RUNNER}._build_attention_metadata", ("num_scheduled_tokens", "for_cudagraph_capture")),
        Takes(f"{_RUNNER}.initialize_kv_cache", ("self", "kv_cache_config")),
        Takes(f"{_RUNNER}.profile_run", ("self",)),
        Takes(f"{_RUNNER}.execute_model", ("self", "scheduler_output")),
        Takes(f"{_RUNNER}.sample_tokens", ("self", "grammar_output")),
        Has("vllm.v1.worker.block_table:SlotMappingMode", ("NONE",)),
        Takes(f"{_ATTENTION}.forward", ("query", "key", "value")),
        Takes(f"{_ATTENTION}.get_kv_cache_spec", ("self", "vllm_config")),
        Takes("vllm.model_executor.models.llama:LlamaDecoderLayer.forward", ("positions", "hidden_states", "residual")),
        Takes("vllm.v1.attention.backend:subclass_attention_backend_with_overrides", ("name_prefix", "overrides")),
        Has("vllm.model_executor.model_loader.utils", ("_MODEL_ARCH_BY_HASH",)),
        Takes(f"{_LLAVA}:LlavaForConditionalGeneration._parse_and_validate_image_input", ("self",)),
        Takes("vllm.model_executor.models.clip:CLIPVisionModel.forward", ("pixel_values", "feature_select_strategy")),
        Takes("vllm.model_executor.models.clip:CLIPVisionEmbeddings.forward", ("pixel_values",)),
        Fields("vllm.v1.attention.backend:CommonAttentionMetadata", (
            "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len",
            "max_seq_len", "block_table_tensor", "slot_mapping", "causal", "logits_indices_padded",
            "num_logits_indices", "max_logits_per_req", "encoder_seq_lens", "encoder_seq_lens_cpu",
            "dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound", "positions", "is_prefilling",
            "seq_lens_cpu_upper_bound", "req_idx", "mm_req_doc_ranges", "rswa_prefix_lens",
            "replayssm_decode_base_cpu", "_num_computed_tokens_cache", "_token_to_req_indices_cache",
        )),
    ),
}  # fmt: skip


def find(where: str) -> Any:
    """What stands at ``module:name.name``; None where there is nothing."""
    module, _, path = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def check_contract(process: Process, more: Sequence[Reliance] = ()) -> None:
    """Checks the reliances of a process, and ``more``, those of the family that is served.

    Raises:
        RuntimeError: all that is missing, in one line, and what to do.
    """
    problems = [problem for reliance in (*RELIANCES[process], *more) for problem in reliance.problems()]
    if problems:
        from vllm import __version__

        listed = "; ".join(problems)
        raise RuntimeError(f"eos: vLLM {__version__} lacks what the {process} relies on: {listed}; {REMEDY}")
