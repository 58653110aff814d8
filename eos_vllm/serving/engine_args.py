"""Flags, refusals and defaults: the one wrap around vLLM's ``EngineArgs``.

Why a wrap: vLLM loads general plugins before it builds its parser, but has no hook for a plugin's own flags or for
checking a configuration. Can go when vLLM has either.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.serving.hosts import TAKE_VIDEOS, host_of, model_classes
from eos_vllm.serving.options import KEY, hand_to_processors, has_page, planner_of, resolve_options

WORKER_EXTENSION = "eos_vllm.serving.worker.EosWorkerExtension"
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
_TEXT_BESIDE = 64


def _drafts_with_a_model(speculation: Any) -> bool:
    method = speculation.get("method") if isinstance(speculation, dict) else getattr(speculation, "method", None)
    return speculation is not None and method != "ngram"


# Engine argument, test that it was asked for, why not. Off by default or switched off by prepare().
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
        _refuse_videos(engine_args)
    if not profile.inside:
        # Nothing happens within the decoder: all that vLLM can do stays as it is.
        engine_args.model_class_overrides = {**engine_args.model_class_overrides, **model_classes()}
        if not engine_args.worker_extension_cls:
            engine_args.worker_extension_cls = WORKER_EXTENSION
        config = create_engine_config(engine_args, *args, **kwargs)
        check_model(profile, config.model_config)
        _ask_model(engine_args, config)
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
        longest = min(config.model_config.max_model_len, max(longest, most_tokens(config) + _TEXT_BESIDE))
    if batched is None and config.scheduler_config.max_num_batched_tokens < longest:
        # So that no image and window of a prompt that fits the model are too long for a step.
        engine_args.max_num_batched_tokens = longest
        config = create_engine_config(engine_args, *args, **kwargs)
    _set_marker(engine_args, config)
    _ask_model(engine_args, config)
    finish(config)
    return config


def _refuse_videos(engine_args: Any) -> None:
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


def _ask_model(engine_args: Any, config: Any) -> None:
    """Puts into the configuration what the profile leaves to the model: the largest image, and text within images."""
    options = engine_args.additional_config[KEY]
    profile = parse_profile(options["profile"])
    host, hf_config = host_of(config.model_config), config.model_config.hf_config
    if profile.before is None:
        options = {**options, "image_token": host.image_token(hf_config)}
    if profile.model.visual_tokens is None and options["example"] is None:
        options = {**options, "example": largest_image(config)}
    engine_args.additional_config = {**engine_args.additional_config, KEY: options}
    config.additional_config = engine_args.additional_config
    planner = planner_of(config)
    assert planner is not None
    planner.counts()  # of the largest image, which a number of tokens may be too few for


def largest_image(config: Any) -> int:
    """Tokens of the largest image that fits a prompt beside a little text, and a step.

    Raises:
        SettingError: not even a small one does.
    """
    from vllm.logger import init_logger

    longest, largest = config.model_config.max_model_len, most_tokens(config)
    fits = min(longest, config.scheduler_config.max_num_batched_tokens) - _TEXT_BESIDE
    if fits < 1:
        raise SettingError("max-model-len", longest, "no image fits beside a little text", "give more")
    if fits < largest:
        message = "eos: images of more than %d tokens are refused, the model makes up to %d of one: a longer "
        message += "--max-num-batched-tokens and --max-model-len take them; or limit pixels by --mm-processor-kwargs"
        init_logger("vllm.eos").warning(message, fits, largest)
    return min(largest, fits)


def most_tokens(config: Any) -> int:
    """Tokens of the largest image that the model's processor lets through."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info: Any = MULTIMODAL_REGISTRY.get_processing_info(config.model_config)
    most = info.get_mm_max_tokens_per_item(config.model_config.max_model_len, {"image": 1}) or {}
    if "image" in most:
        return most["image"]
    size = info.get_image_size_with_most_features()
    return info.get_num_image_tokens(image_width=size.width, image_height=size.height)


def _set_marker(engine_args: Any, config: Any) -> None:
    """Puts the generation prompt's tokens into the configuration, where windows need them."""
    from vllm.logger import init_logger
    from vllm.renderers.chat_utils import load_chat_template

    from eos_vllm.serving.chat_window import find_marker

    options = engine_args.additional_config[KEY]
    if options["marker"] is None and parse_profile(options["profile"]).window == "turn":
        try:
            template = load_chat_template(getattr(engine_args, "eos_chat_template", None))
            marker = list(find_marker(config.model_config, template))
        except ValueError as e:
            marker = []
            init_logger("vllm.eos").warning(
                "eos: the end of a turn was not found in the chat template: %s. All later text of a prompt then scores "
                "its images, and a chat's next turn finds nothing cached behind its first image",
                e,
            )
        options = {**options, "marker": marker}
        engine_args.additional_config = {**engine_args.additional_config, KEY: options}
        config.additional_config = engine_args.additional_config


def prepare(engine_args: Any) -> None:
    """Refuses what cannot go together with a profile, and switches off what is on by default.

    Raises:
        SettingError: an incompatible setting was asked for explicitly.
    """

    for name, asked, why in _REFUSED:
        value = getattr(engine_args, name, None)
        if value is not None and asked(value):
            flag = name.replace("_", "-")
            raise SettingError(flag, value, f"not supported with --eos-profile: {why}", f"leave out --{flag}")
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
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CompilationMode, CUDAGraphMode

    planner = planner_of(vllm_config)
    assert planner is not None
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
    if vllm_config.model_config.get_multimodal_config().get_video_pruning_spec() is not None:
        problem = "it numbers positions anew behind the vision tower, which the plan does not know of"
        raise SettingError("video-pruning-rate", "set", problem, "leave it out")
    if planner.profile.before is not None:
        _check_selection(vllm_config)
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SettingError("VLLM_USE_RUST_FRONTEND", 1, "it does not check requests", "unset it")
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


def _check_selection(vllm_config: Any) -> None:
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


def forget_model_classes() -> None:
    """Lets an engine with a profile start in a process, or a fork of one, that ran the same model without.

    Symptom: the worker refuses to start, for its KV groups are no segments'. Cause: vLLM remembers a model's class by
    name and architecture, and ``model_class_overrides`` is not in the key. Why safe: what is forgotten is looked up
    again. Can go when the overrides are part of the key.
    """
    from vllm.model_executor.model_loader import utils

    utils._MODEL_ARCH_BY_HASH.clear()


def check_model(profile: Profile, model_config: Any) -> None:
    """Whether ``profile`` fits the model, and whether reduction is proven for it.

    Raises:
        ProfileError: the profile was made for another model.
        SettingError: the model is none that can be served with a profile.
    """
    from eos_vllm.core.profile import check_fits
    from eos_vllm.models.geometry import geometry

    host, config = host_of(model_config), model_config.hf_config
    sizes = geometry(config)
    check_fits(profile, sizes)
    host.check_language_model(config)
    host.check(profile, config)


def _exit(error: EosError) -> NoReturn:
    print(f"eos-vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
