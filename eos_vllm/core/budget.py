"""From a retain budget to the number of tokens kept after each reducer (Eq. 11, paper 2.6)."""

import math
from typing import Any

from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import Profile

REQUEST_FIELD = "eos_retain"
_EPSILON = 1e-9


def eq11_counts(profile: Profile) -> tuple[int, ...]:
    """Counts of the profile's own gates and discards, not rescaled: ``max(Kmin, floor((1 - g c) N))`` (Eq. 11)."""
    counts, tokens = [], profile.model.visual_tokens
    for reducer in profile.reducers:
        # The epsilon keeps products such as (1 - 0.55) * 400 from landing just below the whole number they mean.
        tokens = max(min(profile.budget.minimum, tokens), math.floor(reducer.retain * tokens + _EPSILON))
        counts.append(tokens)
    return tuple(counts)


def kept_counts(profile: Profile, budget: int | None = None) -> tuple[int, ...]:
    """Visual tokens of one image left after each reducer.

    A published schedule wins; else every retain share is raised to the one power that meets the budget by the
    profile's measure (paper 2.6). A budget of the image's tokens or more means no reduction.

    Args:
        profile: the operator profile.
        budget: retain budget in tokens per image; the profile's own where None.

    Returns:
        One count per reducer, not increasing.

    Raises:
        BudgetError: the budget is below 1, or below what the measure can reach with these layers.
    """
    total = profile.model.visual_tokens
    budget = profile.budget.tokens if budget is None else budget
    if budget < 1:
        raise BudgetError(REQUEST_FIELD, budget, "a retain budget is at least 1", f"give 1 to {total}")
    if (schedule := profile.schedules.get(str(budget))) is not None:
        return schedule
    if budget >= total:
        return (total,) * len(profile.reducers)
    shares = _cumulative_shares(profile)
    power = _power_for(profile, shares, budget)
    minimum = min(profile.budget.minimum, total)
    counts, previous = [], total
    for share in shares:
        previous = min(previous, max(minimum, math.floor(total * share**power + 0.5)))
        counts.append(previous)
    return tuple(counts)


def _cumulative_shares(profile: Profile) -> list[float]:
    shares, share = [], 1.0
    for reducer in profile.reducers:
        share *= reducer.retain
        shares.append(share)
    return shares


def _power_for(profile: Profile, shares: list[float], budget: int) -> float:
    total = profile.model.visual_tokens
    if shares[-1] >= 1.0:
        raise BudgetError(
            REQUEST_FIELD,
            budget,
            f"no reducer of profile {profile.name!r} discards anything",
            f"give {total}, or a profile whose gate*discard is above 0 somewhere",
        )
    if profile.budget.measure == "final":
        return math.log(budget / total) / math.log(shares[-1])
    if budget <= (floor := layer_average_floor(profile)):
        raise BudgetError(
            REQUEST_FIELD,
            budget,
            f"profile {profile.name!r} measures by layer_average, which cannot go below {floor:.1f} with its layers",
            f"give {math.floor(floor) + 1} to {total}, or use a profile of measure final",
        )

    def average(power: float) -> float:
        return layer_average(profile, [total * share**power for share in shares])

    low, high = 0.0, 1.0
    while average(high) > budget:  # ends, for the limit is the floor
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if average(middle) > budget else (low, middle)
    return high


def layer_average(profile: Profile, counts: tuple[int, ...] | list[float]) -> float:
    """Mean over decoder layers of the visual tokens that a layer caches, given the counts after each reducer."""
    per_segment = (profile.model.visual_tokens, *counts)
    layers = profile.segment_layers()
    return sum(n * tokens for n, tokens in zip(layers, per_segment, strict=True)) / sum(layers)


def layer_average_floor(profile: Profile) -> float:
    """Limit of the layer average for ever smaller budgets: what the layers before the first discard cache."""
    total = profile.model.visual_tokens
    return layer_average(profile, [total if share >= 1.0 else 0.0 for share in _cumulative_shares(profile)])


def parse_budget(value: Any, field: str = REQUEST_FIELD) -> int:
    """A budget as a flag, an option or a request gives it.

    Args:
        value: whole number, or text or float that is exactly one.
        field: name to blame.

    Returns:
        The budget, at least 1. One above the image's tokens is allowed and means no reduction.

    Raises:
        BudgetError: another type, not whole, or below 1.
    """
    remedy = "give a whole number of visual tokens per image, 1 or more"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BudgetError(field, value, f"a {type(value).__name__} is no number", remedy)
    try:
        number = int(value)
        exact = isinstance(value, str) or number == value
    except (ValueError, OverflowError):
        raise BudgetError(field, value, "this is no whole number", remedy) from None
    if not exact:
        raise BudgetError(field, value, "this is no whole number", remedy)
    if number < 1:
        raise BudgetError(field, value, "a retain budget is at least 1", remedy)
    return number
