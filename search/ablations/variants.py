"""Variants of a profile for the studies of placement, operator and robustness: pure functions of a profile.

A variant keeps everything that its study doesn't vary. Where reducers only move, schedules stay, so that a variant
keeps the very counts of the base; schedules that layers were part of (``layer_average``, another number of reducers)
go, and the counts follow from the budget by the profile's rule.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eos_search.theta import default_placement
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.profile import SCHEMA, ModelSpec, Profile, parse_profile

BASE = "base"
# What Fig. 6 sweeps, from one end of each range to the other; the paper doesn't print its own values.
GRID: Mapping[str, tuple[float, ...]] = {
    "gamma": (0.0, 0.05, 0.1, 0.2, 0.5, 1.0),
    "tau": (0.02, 0.1, 0.2, 0.5, 1.0, 10.0),
    "theta": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "rho": (0.0, 0.25, 0.5, 1.0),
    "nu": (0.0, 0.25, 0.5, 1.0),
}
# Table 9 moves the central reducer by two of 32 layers.
_SHIFT, _PAPER_DEPTH = 2, 32
_PAPER_REDUCERS = 3


@dataclass(frozen=True)
class Variant:
    """A profile with one thing changed.

    Attributes:
        label: unique in its study; tables and raw results call it so.
        profile: the changed profile.
        about: what was changed, as plain data that plots read.
    """

    label: str
    profile: Profile
    about: Mapping[str, Any] = field(default_factory=dict)


def base_variant(profile: Profile) -> Variant:
    """The profile as it is."""
    return Variant(BASE, profile, {"layers": list(profile.layers)})


def relocated(profile: Profile, layers: Sequence[int]) -> Profile:
    """The profile with its reducers, operators and all, at other layers.

    Raises:
        ProfileError: another number of layers, or layers that no profile of this model can have.
    """
    if len(layers) != len(profile.reducers):
        problem = f"the profile has {len(profile.reducers)} reducers"
        raise ProfileError("layers", list(layers), problem, "give one layer for each")
    data = profile.to_dict()
    for reducer, layer in zip(data["reducers"], layers, strict=True):
        reducer["layer"] = layer
    if profile.budget.measure == "layer_average":
        data["schedules"] = {}
    return parse_profile(data, placement_label(layers))


def without(profile: Profile, index: int) -> Profile:
    """The profile without one reducer; the others share its part of the reduction.

    Raises:
        ProfileError: it is the only one.
    """
    data = profile.to_dict()
    del data["reducers"][index]
    return parse_profile(data | {"schedules": {}}, f"{profile.name} without reducer {index + 1}")


def placement_label(layers: Sequence[int]) -> str:
    """Layers as the paper writes them: ``{3,6,16}``."""
    return "{" + ",".join(map(str, layers)) + "}"


def placement_variants(profile: Profile, stride: int = 1) -> list[Variant]:
    """Fig. 5: each reducer moved alone over all layers between its neighbours, and the first and last one together.

    Args:
        profile: the base; not among the variants.
        stride: take every so many layers, counted from where a reducer stands.
    """
    layers, end = profile.layers, profile.model.num_decoder_layers - 1
    wanted: dict[tuple[int, ...], None] = {}
    for k, layer in enumerate(layers):
        before, behind = (layers[k - 1] if k else -1), (layers[k + 1] if k + 1 < len(layers) else end)
        for moved in _strided(range(before + 1, behind), layer, stride):
            wanted[(*layers[:k], moved, *layers[k + 1 :])] = None
    for first, last in pair_places(layers, end, stride):
        wanted[(first, *layers[1:-1], last)] = None
    wanted.pop(layers, None)
    return [_moved(profile, places) for places in wanted]


def pair_places(layers: Sequence[int], end: int, stride: int = 1) -> list[tuple[int, int]]:
    """Places of the first and the last reducer, those between staying: the cells of Fig. 5d.

    Args:
        layers: reducers of the base; with fewer than two there are no pairs.
        end: the layer from which on no reducer may stand.
        stride: as in :func:`placement_variants`.
    """
    if len(layers) < 2:
        return []
    inner = layers[1:-1]
    firsts = _strided(range(inner[0] if inner else end - 1), layers[0], stride)
    lasts = _strided(range(inner[-1] + 1 if inner else 1, end), layers[-1], stride)
    return [(first, last) for first in firsts for last in lasts if first < last]


def operator_variants(profile: Profile, grid: Mapping[str, Sequence[float]] = GRID) -> list[Variant]:
    """Fig. 6: each operator parameter of each reducer over a grid, everything else as in the base.

    Left out are values that the base has, and parameters that change nothing there: tau and theta where gamma is 0,
    nu where gamma and rho are.
    """
    found = []
    for k, reducer in enumerate(profile.reducers):
        for parameter, values in grid.items():
            if _inert(parameter, reducer.gamma, reducer.rho):
                continue
            for value in values:
                if value == getattr(reducer, parameter):
                    continue
                data = profile.to_dict()
                data["reducers"][k][parameter] = value
                label = f"layer {reducer.layer}: {parameter}={value:g}"
                about = {"reducer": k, "layer": reducer.layer, "parameter": parameter, "value": value}
                found.append(Variant(label, parse_profile(data, label), about))
    return found


def robustness_variants(profile: Profile) -> list[Variant]:
    """Table 9: each reducer earlier and later, the default placement, and each reducer removed.

    A reducer moves by two of 32 layers at the model's own depth (at least one), unless its neighbour stands there.
    """
    layers, depth = profile.layers, profile.model.num_decoder_layers
    shift = max(1, round(_SHIFT * depth / _PAPER_DEPTH))
    wanted: dict[tuple[int, ...], str] = {}
    for k in range(len(layers)):
        for step, word in ((-shift, "earlier"), (shift, "later")):
            places = (*layers[:k], layers[k] + step, *layers[k + 1 :])
            if _is_placement(places, depth):
                wanted[places] = f"reducer {k + 1} {word} by {shift}"
    if len(layers) <= _PAPER_REDUCERS:
        wanted.setdefault(default_placement(depth, len(layers)), "default placement of the search")
    wanted.pop(layers, None)
    found = [_moved(profile, places, note) for places, note in wanted.items()]
    for k in range(len(layers) if len(layers) > 1 else 0):
        left = without(profile, k)
        if any(reducer.retain < 1 for reducer in left.reducers):
            about = {"layers": list(left.layers), "note": f"reducer {k + 1} removed"}
            found.append(Variant(placement_label(left.layers), left, about))
    return found


def reading_variants(model: ModelSpec) -> list[Variant]:
    """All visual tokens withdrawn behind each layer but the last, and nothing reduced in front of it."""
    found = []
    for layer in range(model.num_decoder_layers - 1):
        data = {
            "schema": SCHEMA,
            "name": f"behind layer {layer}",
            "model": model.model_dump(),
            "importance": {"queries": "image"},
            "reducers": [{"layer": layer, "withdraw": True}],
            "budget": {"measure": "final", "tokens": 1},
        }
        found.append(Variant(f"behind layer {layer}", parse_profile(data, "reading"), {"layer": layer}))
    return found


def _moved(profile: Profile, places: Sequence[int], note: str = "") -> Variant:
    about: dict[str, Any] = {"layers": list(places)} | ({"note": note} if note else {})
    return Variant(placement_label(places), relocated(profile, places), about)


def _strided(places: Iterable[int], origin: int, stride: int) -> list[int]:
    return [place for place in places if (place - origin) % stride == 0]


def _inert(parameter: str, gamma: float, rho: float) -> bool:
    return gamma == 0 and (parameter in ("tau", "theta") or (parameter == "nu" and rho == 0))


def _is_placement(places: Sequence[int], depth: int) -> bool:
    return list(places) == sorted(set(places)) and places[0] >= 0 and places[-1] < depth - 1
