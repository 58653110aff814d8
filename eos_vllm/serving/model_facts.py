"""What a profile leaves to the model, found once at start: its largest image, and where a turn ends in its chats."""

from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import parse_profile
from eos_vllm.serving.hosts import host_of
from eos_vllm.serving.options import KEY, planner_of

TEXT_BESIDE = 64


def ask_model(engine_args: Any, config: Any) -> None:
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
    fits = min(longest, config.scheduler_config.max_num_batched_tokens) - TEXT_BESIDE
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


def set_marker(engine_args: Any, config: Any) -> None:
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
