"""What cannot go together with a profile: refused before a worker starts, in one line that names setting and remedy."""

import os
from collections.abc import Callable
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile, check_fits
from eos_vllm.models.geometry import geometry
from eos_vllm.serving.hosts import host_of

WORKER_EXTENSION = "eos_vllm.serving.worker.EosWorkerExtension"


def _drafts_with_a_model(speculation: Any) -> bool:
    method = speculation.get("method") if isinstance(speculation, dict) else getattr(speculation, "method", None)
    return speculation is not None and method != "ngram"


# Engine argument, test that it was asked for, why not.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("speculative_config", _drafts_with_a_model, "a draft model's layers are in no segment; ngram works"),
    ("spec_method", lambda v: v not in (None, "ngram"), "a draft model's layers are in no segment; ngram works"),
    ("decode_context_parallel_size", lambda v: v > 1, "it shards a KV cache that is thought to be of one length"),
    ("prefill_context_parallel_size", lambda v: v > 1, "it splits a prompt over ranks"),
    ("kv_transfer_config", lambda v: v is not None, "connectors think of one KV length for all layers"),
    ("kv_offloading_size", lambda v: v is not None, "connectors think of one KV length for all layers"),
    ("kv_sharing_fast_prefill", lambda v: v is True, "it skips the layers whose queries score the tokens"),
    ("long_prefill_token_threshold", lambda v: v > 0, "it would cut images from the text that scores them"),
    ("kv_events_config", lambda v: v is not None, "blocks of reduced prompts stand for no range of tokens"),
    ("enable_dbo", lambda v: v is True, "it splits a batch by unreduced tokens"),
    ("disable_hybrid_kv_cache_manager", lambda v: v is True, "each segment needs a KV group of its own"),
    ("scheduler_cls", lambda v: v is not None and "eos_vllm" not in str(v), "the reduction needs its own scheduler"),
    ("worker_extension_cls", lambda v: v not in ("", WORKER_EXTENSION), "the reduction needs its own extension"),
)


def refuse_arguments(engine_args: Any) -> None:
    """Arguments that cannot go together with a profile that reduces within the decoder.

    Raises:
        SettingError: one was asked for explicitly.
    """
    for name, asked, why in _REFUSED:
        value = getattr(engine_args, name, None)
        if value is not None and asked(value):
            flag = name.replace("_", "-")
            raise SettingError(flag, value, f"not supported with --eos-profile: {why}", f"leave out --{flag}")


def refuse_videos(engine_args: Any) -> None:
    """Videos off, with vLLM's own 400 for a request that holds one: nothing is proven of them.

    Raises:
        SettingError: they were asked for.
    """
    limits = dict(engine_args.limit_mm_per_prompt or {})
    asked = limits.get("video", 0)
    if (asked.get("count", 1) if isinstance(asked, dict) else asked) != 0:
        problem = "videos are not reduced, and not proven beside images that are"
        raise SettingError("limit-mm-per-prompt.video", asked, problem, "leave it out")
    engine_args.limit_mm_per_prompt = {**limits, "video": 0}


def check_inside(vllm_config: Any, planner: Planner) -> None:
    """What cannot go together with reducers within the decoder, in the configuration that vLLM made.

    Raises:
        SettingError: it was asked for.
    """
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CompilationMode

    if (runner := vllm_config.model_config.runner_type) != "generate":
        raise SettingError("runner", runner, "pooling reads tokens that are gone", "serve the model to generate")
    if planner.withdraws and planner.block > 1 and (planner.profile.model.visual_tokens or 1) % planner.block:
        of = planner.profile.model.visual_tokens or "any number of"
        problem = f"a withdrawal removes whole blocks, and {of} tokens are none"
        raise SettingError("block-size", planner.block, problem, "leave it out, or give --eos-exact-counts")
    if is_breakable_cudagraph_enabled():
        problem = "the graph of a whole step would replay the unreduced forward pass"
        raise SettingError("VLLM_USE_BREAKABLE_CUDAGRAPH", 1, problem, "unset it, and VLLM_BATCH_INVARIANT")
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        problem = "the whole forward pass would be compiled, without its reduction"
        raise SettingError("compilation-config.mode", 1, problem, "leave it out, or give 3 (VLLM_COMPILE)")
    if vllm_config.ec_manager_config.get_encoder_cache_manager_obj() is not None:
        problem = "the scheduler knows vLLM's own encoder cache manager only"
        raise SettingError("ec-manager-config", "set", problem, "leave it out")


def check_everywhere(vllm_config: Any) -> None:
    """What cannot go together with any profile.

    Raises:
        SettingError: it was asked for.
    """
    if vllm_config.model_config.get_multimodal_config().get_video_pruning_spec() is not None:
        problem = "it numbers positions anew behind the vision tower, which the plan does not know of"
        raise SettingError("video-pruning-rate", "set", problem, "leave it out")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SettingError("VLLM_USE_RUST_FRONTEND", 1, "it does not check requests", "unset it")


def check_selection(vllm_config: Any) -> None:
    """What cannot go together with a selection before the decoder.

    Raises:
        SettingError: it was asked for.
    """
    from vllm.config import CUDAGraphMode

    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if compilation.cudagraph_mm_encoder:
        problem = "the vision tower's graph would be replayed without the selection behind it"
        raise SettingError("compilation-config.cudagraph_mm_encoder", True, problem, "leave it out")
    if not vllm_config.model_config.uses_mrope:
        return
    # Where selected tokens stand is added to positions between embedding and forward pass.
    if parallel.pipeline_parallel_size > 1:
        problem = "with layer -1 later stages would not know where selected tokens stand"
        raise SettingError("pipeline-parallel-size", parallel.pipeline_parallel_size, problem, "leave it out")
    if parallel.enable_dbo:
        raise SettingError("enable-dbo", True, "it splits a batch between embedding and forward pass", "leave it out")
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        # A chunk of one image token looks like a decode step, whose graph would leave its place out.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_model(profile: Profile, model_config: Any) -> None:
    """Whether ``profile`` fits the model, and whether reduction is proven for it.

    Raises:
        ProfileError: the profile was made for another model.
        SettingError: the model is none that can be served with a profile.
    """
    host, config = host_of(model_config), model_config.hf_config
    sizes = geometry(config)
    check_fits(profile, sizes)
    host.check_language_model(config)
    host.check(profile, config)
