"""Flags and defaults: the one wrap around vLLM's ``EngineArgs``.

Why a wrap: vLLM loads general plugins before it builds its parser, but has no hook for a plugin's own flags or for
checking a configuration. Can go when vLLM has either.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import parse_profile
from eos_vllm.serving.hosts import TAKE_VIDEOS, model_classes
from eos_vllm.serving.model_facts import TEXT_BESIDE, ask_model, most_tokens, set_marker
from eos_vllm.serving.options import KEY, hand_to_processors, has_page, planner_of, resolve_options
from eos_vllm.serving.refusals import (
    WORKER_EXTENSION,
    check_everywhere,
    check_inside,
    check_model,
    check_selection,
    refuse_arguments,
    refuse_videos,
)

_SCHEDULERS = {
    False: "eos_vllm.serving.scheduler.EosScheduler",
    True: "eos_vllm.serving.scheduler.EosAsyncScheduler",
}
_COUNTING_SCHEDULERS = {
    False: "eos_vllm.serving.counting.CountingScheduler",
    True: "eos_vllm.serving.counting.CountingAsyncScheduler",
}
_READ_CACHED_KEYS = ("enable_prefix_caching", "enable_chunked_prefill")
# Where the number of tokens per step is left to us, it grows to the model's context, up to here.
_LONGEST_STEP = 8192


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
            metavar="TOKENS|SHARE",
            help="Retain budget per image by the profile's measure: visual tokens, or a share of the image's own such "
            "as 11%%; default: the profile's own. "
            'A request may give its own as vllm_xargs: {"eos_retain": N}.',
        )
        group.add_argument(
            "--eos-elastic",
            default=None,
            metavar="FLOOR:CEILING",
            help="Choose the budget of each request that names none by the load when it arrives, between these two, "
            'such as 64:192. A request may give a floor of its own as vllm_xargs: {"eos_retain_min": N}.',
        )
        group.add_argument(
            "--eos-exact-counts",
            action="store_true",
            help="Keep exactly the profile's counts instead of rounding what is removed to whole KV blocks; the KV of "
            "reduced prompts is then shared up to their first image only.",
        )
        group.add_argument(
            "--eos-page",
            action="store_true",
            help="Serve the page at /eos/, and record what is kept for requests that ask for it as "
            'vllm_xargs: {"eos_trace": true}.',
        )
        return parser

    return wrapped


def _with_values(from_cli_args: Callable) -> Callable:
    @functools.wraps(from_cli_args)
    def wrapped(cls: type, args: Any) -> Any:
        engine_args = from_cli_args(cls, args)
        profile, retain = getattr(args, "eos_profile", None), getattr(args, "eos_retain", None)
        elastic, page = getattr(args, "eos_elastic", None), bool(getattr(args, "eos_page", False))
        if profile is None and retain is None and elastic is None and not page:
            return engine_args
        engine_args.eos_from_cli = True
        engine_args.eos_chat_template = getattr(args, "chat_template", None)
        try:
            exact = bool(getattr(args, "eos_exact_counts", False))
            given = {"profile": profile, "retain": retain, "elastic": elastic, "exact_counts": exact, "page": page}
            options = resolve_options(given)
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
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    options = resolve_options(engine_args.additional_config[KEY])
    engine_args.additional_config = {**engine_args.additional_config, KEY: options}
    profile = parse_profile(options["profile"], options["source"])
    if profile.before is not None and engine_args.enable_tower_connector_lora:
        problem = "adapters of the vision tower are mapped by placeholders, of which there are fewer than patches"
        raise SettingError("enable-tower-connector-lora", True, problem, "leave it out, or reduce in the decoder only")
    if profile.model.architecture in TAKE_VIDEOS:
        refuse_videos(engine_args)
    if not profile.inside:
        # Nothing happens within the decoder: all that vLLM can do stays as it is.
        engine_args.model_class_overrides = {**engine_args.model_class_overrides, **model_classes()}
        if not engine_args.worker_extension_cls:
            engine_args.worker_extension_cls = WORKER_EXTENSION
        config = create_engine_config(engine_args, *args, **kwargs)
        check_model(profile, config.model_config)
        ask_model(engine_args, config)
        finish_before(config)
        return config
    batched = engine_args.max_num_batched_tokens
    prepare(engine_args)
    # vLLM puts its defaults in the place of what was left out.
    asked = [name for name in _READ_CACHED_KEYS if getattr(engine_args, name) is True]
    config = create_engine_config(engine_args, *args, **kwargs)
    if get_kv_quant_mode(config.cache_config.cache_dtype) != KVQuantMode.NONE:
        _turn_off(engine_args, asked, f"keys of a {config.cache_config.cache_dtype} KV cache are not those that score")
        engine_args.max_num_batched_tokens = batched
        config = create_engine_config(engine_args, *args, **kwargs)
    check_model(profile, config.model_config)
    longest = min(config.model_config.max_model_len, _LONGEST_STEP)
    if profile.model.visual_tokens is None:
        # No image is cut from its window, so that the largest one decides.
        longest = min(config.model_config.max_model_len, max(longest, most_tokens(config) + TEXT_BESIDE))
    if batched is None and config.scheduler_config.max_num_batched_tokens < longest:
        # So that no image and window of a prompt that fits the model are too long for a step.
        engine_args.max_num_batched_tokens = longest
        config = create_engine_config(engine_args, *args, **kwargs)
    set_marker(engine_args, config)
    ask_model(engine_args, config)
    finish(config)
    return config


def prepare(engine_args: Any) -> None:
    """Refuses what cannot go together with a profile, and switches off what is on by default.

    Raises:
        SettingError: an incompatible setting was asked for explicitly.
    """
    refuse_arguments(engine_args)
    if engine_args.block_size is None:
        # Removed tokens are rounded to blocks, and these are the smallest that vLLM's kernels take.
        engine_args.block_size = _smallest_block()
    engine_args.model_class_overrides = {**engine_args.model_class_overrides, **model_classes()}
    engine_args.worker_extension_cls = WORKER_EXTENSION


def _turn_off(engine_args: Any, asked: list[str], why: str) -> None:
    """Prefix caching and chunked prefill off, with a log line.

    Raises:
        SettingError: one of them is among those ``asked`` for.
    """
    from vllm.logger import init_logger

    for name in asked:
        flag = name.replace("_", "-")
        raise SettingError(flag, True, f"not supported with --eos-profile here: {why}", f"leave out --{flag}")
    for name in _READ_CACHED_KEYS:
        setattr(engine_args, name, False)
    init_logger("vllm.eos").info("eos: prefix caching and chunked prefill are off: %s", why)


def _smallest_block() -> int:
    from vllm.platforms import current_platform

    return 32 if current_platform.is_cpu() else 16


def finish(vllm_config: Any) -> None:
    """Checks profile against model and completes the configuration.

    Raises:
        ProfileError: the profile was made for another model.
        SettingError: the model is none that can be served with a profile.
    """
    from vllm.config import CUDAGraphMode

    planner = planner_of(vllm_config)
    assert planner is not None
    check_inside(vllm_config, planner)
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = _SCHEDULERS[bool(scheduler.async_scheduling)]
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        # A full graph of a mixed batch would replay the unreduced forward pass.
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    _install(vllm_config)


def finish_before(vllm_config: Any) -> None:
    """As :func:`finish`, of a profile that reduces before the decoder alone."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:  # one that was asked for knows no counts, and can do all else
        scheduler.scheduler_cls = _COUNTING_SCHEDULERS[bool(scheduler.async_scheduling)]
    _install(vllm_config)


def _install(vllm_config: Any) -> None:
    """What this process needs whatever the profile does."""
    from eos_vllm.serving.admission import install_admission
    from eos_vllm.serving.contract import check_contract
    from eos_vllm.serving.endpoints import install_endpoints
    from eos_vllm.serving.metrics import install_stat_logger
    from eos_vllm.serving.request_checks import install_request_checks

    planner = planner_of(vllm_config)
    assert planner is not None
    check_everywhere(vllm_config)
    if planner.profile.before is not None:
        check_selection(vllm_config)
    check_contract("front end")
    hand_to_processors(vllm_config)
    forget_model_classes()
    install_request_checks()
    install_stat_logger()
    install_admission()
    install_endpoints(has_page(vllm_config))
    if vllm_config.additional_config[KEY].get("elastic"):
        check_contract("elastic front end")
        from eos_vllm.serving.streamed_budget import install_streamed_budget

        install_streamed_budget()


def forget_model_classes() -> None:
    """Lets an engine with a profile start in a process, or a fork of one, that ran the same model without.

    Symptom: the worker refuses to start, for its KV groups are no segments'. Cause: vLLM remembers a model's class by
    name and architecture, and ``model_class_overrides`` is not in the key. Why safe: what is forgotten is looked up
    again. Can go when the overrides are part of the key.
    """
    from vllm.model_executor.model_loader import utils

    utils._MODEL_ARCH_BY_HASH.clear()


def _exit(error: EosError) -> NoReturn:
    print(f"eos-vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
