"""Fig. 3: how far the unified operator is from each canonical reduction at its corner."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from eos_search.plots.canvas import panels
from eos_vllm.analysis.equivalence import Check, batch_check, corner_checks, gaussian_tokens

SEEDS = tuple(range(42, 62))
# Differences that are exactly 0 stand on the axis; float32's smallest ones here are some 1e-8.
_LINEAR_BELOW = 1e-8


def gaussian_checks(seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """The paper's Listing 3 on tokens of several seeds (its own is 42), as plain data."""
    found = []
    for seed in seeds:
        checks: list[Check] = [*corner_checks(*gaussian_tokens(seed)), batch_check(seed)]
        found += [{"seed": seed, "tokens": "gaussian", **check.to_dict()} for check in checks]
    return found


def verified_checks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Checks of ``eos-vllm verify --json``, with those on hidden states where a model was given."""
    kinds = {"gaussian": "gaussian", "hidden_states": "hidden states, relative"}
    return [
        {"seed": document.get("seed"), "tokens": tokens, **check}
        for key, tokens in kinds.items()
        for check in document.get(key, ())
    ]


def equivalence_figure(checks: Sequence[Mapping[str, Any]]) -> tuple[Figure, dict[str, Any]]:
    """Fig. 3: the largest difference of every check, by corner, with its bound.

    Args:
        checks: as the other functions of this module give them.

    Returns:
        The figure, and its data.
    """
    names = list(dict.fromkeys(check["check"] for check in checks))
    tokens = list(dict.fromkeys(check["tokens"] for check in checks))
    figure, (axis,) = panels(1, 1, width=5.6, height=3.4)
    for number, kind in enumerate(tokens):
        mine = [check for check in checks if check["tokens"] == kind]
        places = [names.index(check["check"]) + 0.16 * (number - (len(tokens) - 1) / 2) for check in mine]
        axis.plot(places, [check["difference"] for check in mine], "o^s"[number % 3], alpha=0.5, label=kind)
    bounds = {check["check"]: check["bound"] for check in checks}
    axis.hlines(
        [bounds[name] for name in names],
        [place - 0.35 for place in range(len(names))],
        [place + 0.35 for place in range(len(names))],
        colors="red",
        label="bound",
    )
    axis.set_yscale("symlog", linthresh=_LINEAR_BELOW)
    axis.set_ylim(-_LINEAR_BELOW / 4, None)
    axis.set_xticks(range(len(names)), names)
    broken = sum(not check["ok"] for check in checks)
    axis.set(
        title=f"unified operator against canonical ones: {broken or 'no'} bound{'s' * (broken > 1)} broken",
        xlabel="corner (BATCH: one call for several images)",
        ylabel="largest difference of an element",
    )
    axis.legend(loc="upper left")
    return figure, {"figure": "equivalence", "checks": [dict(check) for check in checks]}
