"""Profiles that have a cost by construction: the layer average of their counts is what was asked for.

The arithmetic is that of :mod:`eos_vllm.core.budget`: all retain shares are raised to one power (paper 2.6). Counts are
whole, so that the nearest ones are looked for, and written down.
"""

from collections.abc import Sequence

from eos_vllm.core.budget import Share, image_size, kept_counts, layer_average
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import SCHEMA, ModelSpec, Profile, Withdrawal, parse_profile

# Each halves a range of two tokens: what is left of it is below what any count can tell apart.
_HALVINGS = 14
# What rounding to whole tokens may leave between a cost and the nearest counts.
OFF = 0.5


def at_costs(draft: Profile, costs: Sequence[int]) -> Profile:
    """The draft with discards that meet the first cost, and a schedule for each of them.

    Args:
        draft: gives everything else; its retain shares say how reducers divide the reduction. Its measure is
            ``layer_average``; schedules of its own stay as they are.
        costs: layer averages in tokens, each below the image's; the first becomes the profile's budget.

    Returns:
        A profile whose counts at each cost have a layer average within half a token of it: less than 1 % from 50 tokens
        on. Eq. 11 of its own gates and discards gives the counts of the first.

    Raises:
        BudgetError: a cost that the layers cannot have: below what they can reach, or above what a withdrawal leaves.
    """
    schedules = {str(cost): list(nearest_counts(draft, cost)) for cost in costs}
    data, left = draft.to_dict(), image_size(draft)
    for reducer, count in zip(data["reducers"], schedules[str(costs[0])], strict=True):
        if "withdraw" not in reducer:
            reducer.update(gate=1.0, discard=1.0 - count / left)
            left = count
    budget = {"measure": "layer_average", "tokens": costs[0], "minimum": draft.budget.minimum}
    return parse_profile(data | {"budget": budget, "schedules": schedules}, draft.name)


def nearest_counts(draft: Profile, cost: int) -> tuple[int, ...]:
    """Counts after each reducer, of those that the profile's rule gives, with the layer average nearest to ``cost``.

    A schedule of the draft's own for that cost comes first.

    Raises:
        BudgetError: as :func:`at_costs`.
    """
    if (own := draft.schedules.get(str(cost))) is not None:
        return own
    total = image_size(draft)
    best = kept_counts(draft, cost)
    # One power, then rounding: each segment is off by less than a token, and so is their mean.
    low, high = cost - 1.0, min(cost + 1.0, float(total))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            counts = kept_counts(draft, Share(middle / total))
        except BudgetError:  # below what the layers can reach
            low = middle
            continue
        found = layer_average(draft, counts)
        if abs(found - cost) < abs(layer_average(draft, best) - cost):
            best = counts
        low, high = (middle, high) if found < cost else (low, middle)
    if abs(off := (nearest := layer_average(draft, best)) - cost) > OFF + 1e-9:
        bound, remedy = ("least", "more, or a smaller minimum") if off > 0 else ("most", "less, or reduce later")
        raise BudgetError(
            "cost", cost, f"the layers of {draft.name} come to {nearest:.1f} at {bound}", f"give {remedy}"
        )
    return best


def latest_first_layer(model: ModelSpec, cost: int) -> int | None:
    """The last layer behind which a first reducer can still meet a layer average; None where not even layer 0 can.

    Args:
        model: the model, with a fixed number of visual tokens.
        cost: layer average in tokens.
    """
    found = None
    for layer in range(model.num_decoder_layers - 1):
        if layer_average(draft_profile(model, [prune_reducer(layer)], cost), (1,)) > cost:
            break
        found = layer
    return found


def draft_profile(
    model: ModelSpec,
    reducers: Sequence[dict[str, object]],
    cost: int,
    queries: str = "image",
    minimum: int = 1,
    name: str = "draft",
) -> Profile:
    """A profile by ``layer_average`` from the reducers' plain data, for :func:`at_costs`."""
    data = {
        "schema": SCHEMA,
        "name": name,
        "model": model.model_dump(),
        "importance": {"queries": queries},
        "reducers": list(reducers),
        "budget": {"measure": "layer_average", "tokens": cost, "minimum": minimum},
    }
    return parse_profile(data, name)


def prune_reducer(layer: int, discard: float = 0.5) -> dict[str, object]:
    """Plain data of a reducer that only drops."""
    neutral = {"gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}
    return {"layer": layer, "gate": 1.0, "discard": discard, **neutral}


def reduces(profile: Profile) -> list[int]:
    """Places in ``profile.reducers`` of those that are no withdrawal."""
    return [i for i, reducer in enumerate(profile.reducers) if not isinstance(reducer, Withdrawal)]
