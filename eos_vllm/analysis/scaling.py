"""One profile made to fit another budget (paper 2.6) or another model: pure functions from profile to profile."""

import math
from collections.abc import Sequence
from typing import Any

from eos_vllm.core.budget import RetainBudget, Share, kept_counts, own_budget, plain
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.profile import SCHEMA, Profile, WindowKind, parse_profile

_DESCRIPTION_LIMIT = 4000

# Visual tokens of an image, where any do to see whether a budget can be met.
_ANY = 1024


def rescale(profile: Profile, budget: RetainBudget) -> Profile:
    """The same layers and operators for another budget; the counts that follow are written down in ``schedules``.

    Args:
        profile: any profile.
        budget: retain budget per image, by the profile's own measure.

    Returns:
        A profile with that budget of its own. A schedule that was there for it stays as it is; shares of images of any
        size have none.

    Raises:
        BudgetError: as :func:`eos_vllm.core.budget.kept_counts`.
    """
    data = profile.to_dict()
    rest = {"measure": profile.budget.measure, "minimum": profile.budget.minimum}
    if isinstance(budget, Share):
        data["schema"], data["budget"] = SCHEMA, {**rest, "share": budget.value}
    else:
        data["budget"] = {**rest, "tokens": budget}
    if profile.model.visual_tokens is not None:
        counts = kept_counts(profile, budget)
        if isinstance(budget, int):
            data["schedules"][str(budget)] = list(counts)
    data["provenance"]["rescaled"] = {"name": profile.name, "budget": plain(own_budget(profile))}
    return parse_profile(data, f"{profile.name} rescaled")


def scale_layers(layers: tuple[int, ...], depth: int, new_depth: int) -> tuple[int, ...]:
    """Reducer layers at the same share of another depth.

    A reducer after layer l leaves ``(l + 1) / depth`` of the layers in front of it; that share is kept, rounded half
    up. Layers that would fall together or off either end move to the nearest free one.

    Raises:
        ProfileError: fewer places than reducers; the last layer is no place.
    """
    if len(layers) > new_depth - 1:
        raise ProfileError(
            "layers", new_depth, f"{len(layers)} reducers do not fit", f"give {len(layers) + 1} layers or more"
        )
    scaled = [math.floor((layer + 1) * new_depth / depth + 0.5) - 1 for layer in layers]
    for k in range(len(scaled)):
        scaled[k] = max(scaled[k], scaled[k - 1] + 1 if k else 0)
    for k in reversed(range(len(scaled))):
        scaled[k] = min(scaled[k], scaled[k + 1] - 1 if k + 1 < len(scaled) else new_depth - 2)
    return tuple(scaled)


def scale_to_model(
    profile: Profile, num_decoder_layers: int, visual_tokens: int | None, name: str | None = None
) -> Profile:
    """The profile for a model of another depth or another number of visual tokens.

    Layers keep their share of the depth (:func:`scale_layers`); budget, minimum and schedules keep their share of the
    visual tokens, rounded half up and at least 1. Operators, gates, discards and the tower layers of a selector stay.
    It is a place to start from, not a result: what was searched for one model need not be best for another.

    Args:
        profile: any profile.
        num_decoder_layers: depth of the other model.
        visual_tokens: its visual tokens per image; None where both models take images of any size.
        name: name of the result; the profile's own with the depth appended where None.

    Raises:
        ProfileError: more reducers than places, or sizes that no profile can have.
        BudgetError: the scaled budget is below what the scaled layers can reach by ``layer_average``.
    """
    model = profile.model
    layers = scale_layers(profile.layers, model.num_decoder_layers, num_decoder_layers)

    if (visual_tokens is None) != (model.visual_tokens is None):
        problem = "tokens of an image of fixed size are no shares of images of any size"
        raise ProfileError(
            "visual-tokens", visual_tokens, problem, "scale to a model whose images are of the same kind"
        )

    def tokens(count: int) -> int:
        if visual_tokens is None or model.visual_tokens is None:
            return count
        return count and max(1, math.floor(count * visual_tokens / model.visual_tokens + 0.5))

    images = "images of any size" if model.visual_tokens is None else f"{model.visual_tokens} visual tokens"
    origin = f"Scaled from {profile.name} ({model.num_decoder_layers} layers, {images})"
    about = f"; of that one is said: {profile.description}" if profile.description else ""
    data: dict[str, Any] = profile.to_dict()
    data["name"] = name or f"{profile.name}-{num_decoder_layers}-layers"
    data["description"] = (origin + about)[:_DESCRIPTION_LIMIT].rstrip()
    if profile.budget.measure != "flops":
        data["model"].pop("flops_crossover", None)  # of the other model's width, which is not known here
    data["model"] |= {"num_decoder_layers": num_decoder_layers, "visual_tokens": visual_tokens}
    if (debias := data["importance"].get("debias")) and visual_tokens is not None:
        _refuse_debias(profile, debias, visual_tokens)
    for reducer, layer in zip(data["reducers"][-len(layers) :] if layers else (), layers, strict=True):
        reducer["layer"] = layer
    data["budget"]["minimum"] = tokens(profile.budget.minimum)
    if profile.budget.tokens is not None:
        data["budget"]["tokens"] = tokens(profile.budget.tokens)
    # Ascending, so that of budgets that fall together the largest wins, whatever the order in the file.
    data["schedules"] = {
        str(tokens(int(budget))): [tokens(count) for count in counts]
        for budget, counts in sorted(profile.schedules.items(), key=lambda item: int(item[0]))
    }
    data["provenance"] = {"scaled_from": profile.to_dict()["model"] | {"name": profile.name}}
    scaled = parse_profile(data, data["name"])
    kept_counts(scaled, total=visual_tokens or _ANY)
    return scaled


def _refuse_debias(profile: Profile, debias: Sequence[float], visual_tokens: int) -> None:
    if len(debias) != visual_tokens:
        problem = f"it was measured on {len(debias)} places of an image"
        raise ProfileError("importance.debias", profile.name, problem, "leave it out, or measure it on the other model")


def upgrade(profile: Profile, window: WindowKind | None = None) -> Profile:
    """The profile in schema ``eos-profile/2``. It means what it meant, unless another ``window`` is asked for.

    Raises:
        ProfileError: a window for a profile whose image asks.
    """
    data = profile.to_dict() | {"schema": SCHEMA}
    if profile.window != "image" or window is not None:
        data["importance"]["window"] = window or profile.window
    return parse_profile(data, profile.name)
