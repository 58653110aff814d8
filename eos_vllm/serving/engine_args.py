"""Flags, refusals and defaults: the one wrap around vLLM's ``EngineArgs`` (design section 5, points 1 and 6).

Why a wrap: vLLM loads general plugins before it builds its parser, but has no hook for a plugin's own flags or for
checking a configuration. Can go when vLLM has either.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.serving.options import KEY, planner_of, resolve_options

ARCHITECTURE = "LlavaForConditionalGeneration"
MODEL_CLASS = "eos_vllm.serving.model:EosLlavaForConditionalGeneration"
WORKER_EXTENSION = "eos_vllm.serving.worker.EosWorkerExtension"
_SCHEDULERS = {
    False: "eos_vllm.serving.scheduler.EosScheduler",
    True: "eos_vllm.serving.scheduler.EosAsyncScheduler",
}
_PROVEN_LANGUAGE_MODELS = ("llama",)

# Engine argument, test that it was asked for, why not. Off by default or switched off by prepare().
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("enable_prefix_caching", lambda v: v is True, "KV behind a reducer depends on the question"),
    ("enable_chunked_prefill", lambda v: v is True, "a prompt with images must be prefilled in one step"),
    ("speculative_config", lambda v: v is not None, "draft and target would see different tokens"),
    ("spec_method", lambda v: v is not None, "draft and target would see different tokens"),
    ("pipeline_parallel_size", lambda v: v > 1, "stages would have to pass on reduced batches"),
    ("decode_context_parallel_size", lambda v: v > 1, "it shards a KV cache that is thought to be of one length"),
    ("prefill_context_parallel_size", lambda v: v > 1, "it splits a prompt over ranks"),
    ("kv_transfer_config", lambda v: v is not None, "connectors think of one KV length for all layers"),
    ("kv_offloading_size", lambda v: v is not None, "connectors think of one KV length for all layers"),
    ("kv_sharing_fast_prefill", lambda v: v is True, "it skips the layers whose queries score the tokens"),
    ("long_prefill_token_threshold", lambda v: v > 0, "a prompt with images must be prefilled in one step"),
    ("enable_lora", lambda v: v is True, "adapters are mapped to unreduced tokens"),
    ("enable_dbo", lambda v: v is True, "it splits a batch by unreduced tokens"),
    ("disable_hybrid_kv_cache_manager", lambda v: v is True, "each segment needs a KV group of its own"),
    ("scheduler_cls", lambda v: v is not None and "eos_vllm" not in str(v), "the reduction needs its own scheduler"),
    ("worker_extension_cls", lambda v: v not in ("", WORKER_EXTENSION), "the reduction needs its own extension"),
    ("runner", lambda v: v == "pooling", "pooling reads tokens that are gone"),
)


def install() -> None:
    """Wraps ``EngineArgs`` once per process."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "eos_installed", False):
        return
    EngineArgs.eos_installed = True  # type: ignore[attr-defined]
    EngineArgs.add_cli_args = staticmethod(_with_flags(EngineArgs.add_cli_args))  # type: ignore[method-assign]
    EngineArgs.from_cli_args = classmethod(_with_values(EngineArgs.from_cli_args.__func__))  # type: ignore
    EngineArgs.create_engine_config = _with_profile(EngineArgs.create_engine_config)  # type: ignore[method-assign]


def _with_flags(add_cli_args: Callable) -> Callable:
    @functools.wraps(add_cli_args)
    def wrapped(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group("eos", "In-decoder visual token reduction (eos-vllm).")
        group.add_argument(
            "--eos-profile",
            default=None,
            metavar="PROFILE",
            help="Operator profile: a file, a shipped name (`eos-vllm profile list`), an https:// URL or a hub repo. "
            "Without it the plugin changes nothing.",
        )
        group.add_argument(
            "--eos-retain",
            default=None,
            metavar="TOKENS",
            help="Retain budget per image, in visual tokens by the profile's measure; default: the profile's own. "
            'A request may give its own as vllm_xargs: {"eos_retain": N}.',
        )
        return parser

    return wrapped


def _with_values(from_cli_args: Callable) -> Callable:
    @functools.wraps(from_cli_args)
    def wrapped(cls: type, args: Any) -> Any:
        engine_args = from_cli_args(cls, args)
        profile, retain = getattr(args, "eos_profile", None), getattr(args, "eos_retain", None)
        if profile is None and retain is None:
            return engine_args
        engine_args.eos_from_cli = True
        try:
            options = resolve_options({"profile": profile, "retain": retain})
        except EosError as e:
            _exit(e)
        engine_args.additional_config = {**(engine_args.additional_config or {}), KEY: options}
        # Further API servers parse these very arguments anew, before any plugin is loaded in them.
        args.additional_config = engine_args.additional_config
        return engine_args

    return wrapped


def _with_profile(create_engine_config: Callable) -> Callable:
    @functools.wraps(create_engine_config)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.additional_config
        if not (isinstance(config, dict) and config.get(KEY)):
            return create_engine_config(self, *args, **kwargs)
        try:
            return _create(self, create_engine_config, args, kwargs)
        except EosError as e:
            if getattr(self, "eos_from_cli", False):
                _exit(e)
            raise

    return wrapped


def _create(engine_args: Any, create_engine_config: Callable, args: tuple, kwargs: dict) -> Any:
    options = resolve_options(engine_args.additional_config[KEY])
    engine_args.additional_config = {**engine_args.additional_config, KEY: options}
    batched = engine_args.max_num_batched_tokens
    prepare(engine_args)
    try:
        config = create_engine_config(engine_args, *args, **kwargs)
    except ValueError as e:
        # vLLM checks the same, once chunked prefill is off; say it in terms of what the user typed.
        if batched is None or "max_num_batched_tokens" not in str(e) or "max_model_len" not in str(e):
            raise
        raise _too_few("max-num-batched-tokens", batched) from None
    scheduler, longest = config.scheduler_config, config.model_config.max_model_len
    if scheduler.max_num_batched_tokens < longest:
        raise _too_few("max-num-batched-tokens", scheduler.max_num_batched_tokens)
    if scheduler.max_num_scheduled_tokens is not None and scheduler.max_num_scheduled_tokens < longest:
        raise _too_few("max-num-scheduled-tokens", scheduler.max_num_scheduled_tokens)
    finish(config)
    return config


def _too_few(flag: str, tokens: int) -> SettingError:
    problem = "it is below max-model-len, but a prompt with images must be prefilled in one step"
    return SettingError(flag, tokens, problem, "raise it to max-model-len or more, or lower --max-model-len")


def prepare(engine_args: Any) -> None:
    """Refuses what cannot go together with a profile, and switches off what is on by default.

    Raises:
        SettingError: an incompatible setting was asked for explicitly.
    """
    from vllm.logger import init_logger

    for name, asked, why in _REFUSED:
        value = getattr(engine_args, name, None)
        if value is not None and asked(value):
            flag = name.replace("_", "-")
            raise SettingError(flag, value, f"not supported with --eos-profile: {why}", f"leave out --{flag}")
    engine_args.enable_prefix_caching = False
    engine_args.enable_chunked_prefill = False
    engine_args.model_class_overrides = {**engine_args.model_class_overrides, ARCHITECTURE: MODEL_CLASS}
    engine_args.worker_extension_cls = WORKER_EXTENSION
    logger = init_logger("vllm.eos")
    logger.info("eos: prefix caching and chunked prefill are off while a profile is active")
    if "VLLM_USE_V2_MODEL_RUNNER" not in os.environ:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        logger.info("eos: using the V1 model runner; VLLM_USE_V2_MODEL_RUNNER=1 tries V2, which is not proven yet")


def finish(vllm_config: Any) -> None:
    """Checks profile against model and completes the configuration.

    Raises:
        ProfileError: the profile was made for another model.
        SettingError: the model is none that can be served with a profile.
    """
    from vllm.config import CUDAGraphMode

    from eos_vllm.serving.metrics import install_stat_logger
    from eos_vllm.serving.request_checks import install_request_checks

    planner = planner_of(vllm_config)
    assert planner is not None
    check_model(planner.profile, vllm_config.model_config)
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = _SCHEDULERS[bool(scheduler.async_scheduling)]
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        # A full graph of a mixed batch would replay the unreduced forward pass.
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    forget_model_classes()
    install_request_checks(planner)
    install_stat_logger()


def forget_model_classes() -> None:
    """Lets an engine with a profile start in a process, or a fork of one, that ran the same model without.

    Symptom: the worker refuses to start, for its KV groups are no segments'. Cause: vLLM remembers a model's class by
    name and architecture, and ``model_class_overrides`` is not in the key. Why safe: what is forgotten is looked up
    again. Can go when the overrides are part of the key.
    """
    from vllm.model_executor.model_loader import utils

    utils._MODEL_ARCH_BY_HASH.clear()


def check_model(profile: Profile, model_config: Any) -> None:
    """Whether ``profile`` fits the model; errors as in :func:`finish`."""
    from eos_vllm.core.comparison import check_fits
    from eos_vllm.models.geometry import geometry

    architectures = list(model_config.architectures or [])
    if ARCHITECTURE not in architectures:
        remedy = f"serve a {ARCHITECTURE}, or leave out --eos-profile"
        raise SettingError("model", model_config.model, f"its architecture is {architectures}", remedy)
    config = model_config.hf_config
    if (kind := config.text_config.model_type) not in _PROVEN_LANGUAGE_MODELS:
        remedy = f"serve a LLaVA whose language model is one of {list(_PROVEN_LANGUAGE_MODELS)}"
        raise SettingError("model.text_config.model_type", kind, "reduction is not proven for it", remedy)
    if (kind := config.vision_config.model_type) == "pixtral":
        raise SettingError("model.vision_config.model_type", kind, "images of varying length", "serve a CLIP LLaVA")
    check_fits(profile, geometry(config))


def _exit(error: EosError) -> NoReturn:
    print(f"eos-vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
