"""Fig. 8: where a search went, from its records, and what a profile does at each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from eos_search.plots.canvas import MARKS, panels
from eos_search.theta import KINDS, Kind, layers_of
from eos_vllm.core.budget import kept_counts, layer_average, own_budget, plain, segment_tokens
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

_SHOWN: tuple[Kind, ...] = ("gate", "discard", "gamma", "tau")
_IDLE = "#c9c9c9"
_OPERATOR = ("gamma", "tau", "theta", "rho", "nu")


def trajectory(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What Fig. 8 shows, from a search's records.

    Args:
        records: of :func:`eos_search.run_folder.read_records`.

    Returns:
        Plain data: the steps at which Theta was recorded, the layers that act at the last of them, and for each kind
        of parameter its values by layer and step; before each step's update.

    Raises:
        EosError: no record holds Theta.
    """
    told = [record for record in records if "values" in record]
    if not told:
        raise EosError("--run", len(records), "records hold no values of Theta", "give the folder of a search that ran")
    values = {kind: list(map(list, zip(*(record["values"][kind] for record in told), strict=True))) for kind in KINDS}
    return {"steps": [record["step"] for record in told], "acting": told[-1]["acting"], "values": values}


def search_figure(records: Sequence[Mapping[str, Any]]) -> tuple[Figure, dict[str, Any]]:
    """Fig. 8: gates, discards, gamma and tau by layer at the last record, and over the steps; acting layers in colour.

    Returns:
        The figure, and its data.
    """
    data = trajectory(records)
    figure, axes = panels(2, len(_SHOWN), width=4.2)
    colours = {layer: f"C{number % 10}" for number, layer in enumerate(data["acting"])}
    for kind, by_layer, over_steps in zip(_SHOWN, axes[: len(_SHOWN)], axes[len(_SHOWN) :], strict=True):
        lines = data["values"][kind]
        last = [line[-1] for line in lines]
        layers = layers_of(len(last), data["acting"])
        by_layer.bar(layers, last, color=[colours.get(layer, _IDLE) for layer in layers])
        title = f"{kind} by layer at step {data['steps'][-1]} (grey: doesn't act)"
        by_layer.set(title=title, xlabel="decoder layer", ylabel=kind)
        for layer, line in zip(layers, lines, strict=True):
            if layer not in colours:
                over_steps.plot(data["steps"], line, color=_IDLE, linewidth=0.6)
        for number, (layer, colour) in enumerate(colours.items()):
            (line,) = over_steps.plot(data["steps"], lines[layer], color=colour, label=f"layer {layer}")
            line.set(marker=MARKS[number % len(MARKS)], markersize=3, markevery=0.1)
        over_steps.set(title=f"{kind} during the search", xlabel="step", ylabel=kind)
        if colours:
            over_steps.legend()
    return figure, {"figure": "search", **data}


def profile_figure(profile: Profile, budgets: Sequence[int | None]) -> tuple[Figure, dict[str, Any]]:
    """The layers of a profile: visual tokens that each sees at some budgets, and the operator of each reducer.

    Args:
        profile: any profile.
        budgets: retain budgets per image; None for the profile's own.

    Returns:
        The figure, and its data.
    """
    depth = profile.model.num_decoder_layers
    figure, axes = panels(1, 2, width=4.6, height=3.2)
    data: dict[str, Any] = {"figure": "profile", "profile": profile.name, "tokens": {}, "operators": []}
    for budget in budgets:
        counts = kept_counts(profile, budget)
        tokens = segment_tokens(profile, counts)
        seen = [tokens[profile.segment_of_layer(layer)] for layer in range(depth)]
        own = plain(own_budget(profile)) if budget is None else budget
        mean = layer_average(profile, counts)
        axes[0].step(range(depth), seen, where="mid", label=f"retain {own} (layer average {mean:.1f})")
        data["tokens"][str(own)] = {"by_layer": seen, "layer_average": round(mean, 2)}
    for layer in profile.layers:
        axes[0].axvline(layer + 0.5, color="grey", linestyle=":", linewidth=1)
    axes[0].set(title=profile.name, xlabel="decoder layer", ylabel="visual tokens that it sees", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=7)
    data["operators"] = [reducer.model_dump() for reducer in profile.reducers]
    _bars(axes[1], profile)
    return figure, data


def _bars(axis: Axes, profile: Profile) -> None:
    width = 0.8 / len(profile.reducers)
    for number, reducer in enumerate(profile.reducers):
        places = [index + (number - (len(profile.reducers) - 1) / 2) * width for index in range(len(_OPERATOR))]
        values = [getattr(reducer, name) for name in _OPERATOR]
        bars = axis.bar(places, [min(value, 1.0) for value in values], width, label=f"after layer {reducer.layer}")
        axis.bar_label(bars, [f"{value:.2g}" for value in values], fontsize=6, rotation=90, padding=2)
    axis.axhline(0, color="grey", linewidth=1)
    axis.set_xticks(range(len(_OPERATOR)), _OPERATOR)
    axis.set(title="operators", ylabel="value (tau above 1 is cut off)", ylim=(None, 1.25))
    axis.legend(fontsize=7)
