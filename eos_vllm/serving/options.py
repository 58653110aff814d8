"""The one place where serving reads its settings: ``vllm_config.additional_config["eos"]``."""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eos_vllm.core.budget import parse_budget, plain
from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.serving.elastic import FLAG, parse_range
from eos_vllm.serving.sources import load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "eos"
_FIELDS = {"profile", "retain", "source", "marker", "exact_counts", "example", "image_token", "elastic", "page"}
_ANY = 1024


def resolve_options(raw: Any) -> dict[str, Any]:
    """Validates ``{"profile": ..., "retain": ..., ...}`` and puts the profile's own data where its source stood.

    Args:
        raw: what ``additional_config["eos"]`` holds, from the flags or from ``LLM(additional_config=...)``.

    Returns:
        Plain data with ``profile`` (dict), ``source`` (str), ``retain`` (int or None), ``exact_counts`` (bool),
        ``marker`` (tokens of the chat template's generation prompt, None where not looked for yet), ``elastic`` (floor
        and ceiling), ``page`` (whether the page and traces are on), and what is found out of the model: ``example``
        (tokens of its largest image) and ``image_token``.
        Resolving twice is harmless.

    Raises:
        SettingError, ProfileError, BudgetError: one line each.
    """
    if not isinstance(raw, dict) or (unknown := set(raw) - _FIELDS):
        problem = f"unknown fields {sorted(unknown)}" if isinstance(raw, dict) else "it is no object"
        raise SettingError("additional_config.eos", raw, problem, 'give {"profile": ..., "retain": ...}')
    if raw.get("profile") is None:
        if raw.get("page"):
            raise SettingError("eos-page", True, "a page without a profile", "give --eos-profile as well")
        raise SettingError(
            "eos-retain", raw.get("retain"), "a budget without a profile", "give --eos-profile (or eos.profile) as well"
        )
    profile = load_profile(raw["profile"])
    retain = None if raw.get("retain") is None else parse_budget(raw["retain"], "eos-retain")
    # Of an image of any size, whatever one: shares can be met for all or none.
    Planner(profile, retain, example=_ANY).counts()
    elastic = None
    if raw.get("elastic") is not None:
        given = raw["elastic"]
        elastic = [plain(b) for b in parse_range(given if isinstance(given, str) else ":".join(map(str, given)))]
        if retain is not None and plain(retain) != elastic[1]:
            raise SettingError("eos-retain", raw["retain"], "--eos-elastic chooses the budget", "leave one of them out")
        if profile.before is not None:
            problem = "with layer -1 a prompt is rendered before the scheduler sees the request"
            raise SettingError(FLAG, raw["elastic"], problem, "leave it out, or reduce in the decoder only")
        for budget in elastic:
            Planner(profile, parse_budget(budget), example=_ANY).counts()
        retain = parse_budget(elastic[1])  # what reports and front ends think of
    source = raw.get("source") or (raw["profile"] if isinstance(raw["profile"], str) else profile.name)
    marker = raw.get("marker")
    if marker is not None and not (isinstance(marker, list | tuple) and all(isinstance(m, int) for m in marker)):
        raise SettingError("additional_config.eos.marker", marker, "it is no list of token ids", "leave it out")
    return {
        "profile": profile.to_dict(),
        "source": source,
        "retain": None if retain is None else plain(retain),
        "elastic": elastic,
        "example": raw.get("example"),
        "image_token": raw.get("image_token"),
        "exact_counts": bool(raw.get("exact_counts", False)),
        "page": bool(raw.get("page", False)),
        "marker": None if marker is None else list(marker),
    }


def planner_of(vllm_config: "VllmConfig") -> Planner | None:
    """The planner that the configuration asks for, or None where no profile is active."""
    config = vllm_config.additional_config
    options = config.get(KEY) if isinstance(config, dict) else None
    return _planner(json.dumps(options, sort_keys=True), vllm_config.cache_config.block_size) if options else None


def hand_to_processors(vllm_config: "VllmConfig") -> None:
    """Puts the settings where processors find them: these are made from the model's configuration alone, everywhere."""
    options = {**vllm_config.additional_config[KEY], "block": vllm_config.cache_config.block_size}  # type: ignore[index]
    vllm_config.model_config.hf_config.eos_options = options


def planner_of_processor(hf_config: Any) -> Planner | None:
    """The planner that :func:`hand_to_processors` left, None where no profile is active."""
    options = dict(getattr(hf_config, "eos_options", None) or {})
    block = options.pop("block", 1)
    return _planner(json.dumps(options, sort_keys=True), block) if options else None


@lru_cache(maxsize=8)
def _planner(options: str, block_size: int) -> Planner:
    data = json.loads(options)
    profile: Profile = parse_profile(data["profile"], data["source"])
    retain = None if data["retain"] is None else parse_budget(data["retain"])
    block = 1 if data["exact_counts"] else block_size
    low_high = data["elastic"]
    elastic = None if low_high is None else (parse_budget(low_high[0]), parse_budget(low_high[1]))
    return Planner(profile, retain, block, data["marker"] or (), data["example"], data["image_token"], elastic)


def has_page(vllm_config: "VllmConfig") -> bool:
    """Whether the page, and with it traces, are on (``--eos-page``)."""
    config = vllm_config.additional_config
    return bool(isinstance(config, dict) and (config.get(KEY) or {}).get("page"))


def reads_cached_keys(vllm_config: "VllmConfig") -> bool:
    """Whether an image may stand behind tokens of earlier steps, whose keys its scores then need."""
    return bool(vllm_config.cache_config.enable_prefix_caching or vllm_config.scheduler_config.enable_chunked_prefill)
