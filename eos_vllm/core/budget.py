"""From a retain budget to the number of tokens kept after each reducer (Eq. 11, paper 2.6)."""

import math
from collections.abc import Sequence
from typing import Any

from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import BudgetMeasure, Profile, Withdrawal

REQUEST_FIELD = "eos_retain"
# Text of the prompt whose FLOPs are compared, as the field does for LLaVA.
TEXT_TOKENS = 88
_EPSILON = 1e-9


def eq11_counts(profile: Profile) -> tuple[int, ...]:
    """Counts of the profile's own gates and discards, not rescaled: ``max(Kmin, floor((1 - g c) N))`` (Eq. 11)."""
    counts, tokens = [], profile.model.visual_tokens
    for reducer in profile.reducers:
        if isinstance(reducer, Withdrawal):
            counts.append(0)
            continue
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
        if share > 0:
            previous = min(previous, max(minimum, math.floor(total * share**power + 0.5)))
        counts.append(previous if share > 0 else 0)
    return tuple(counts)


def _cumulative_shares(profile: Profile) -> list[float]:
    shares, share = [], 1.0
    for reducer in profile.reducers:
        share *= reducer.retain
        shares.append(share)
    return shares


def _power_for(profile: Profile, shares: list[float], budget: int) -> float:
    total, measure = profile.model.visual_tokens, profile.budget.measure
    if all(share >= 1.0 for share in shares):
        raise BudgetError(
            REQUEST_FIELD,
            budget,
            f"no reducer of profile {profile.name!r} discards anything",
            f"give {total}, or a profile whose gate*discard is above 0 somewhere",
        )
    rescaled = [share for share in shares if share > 0]
    if measure == "final" and rescaled and rescaled[-1] < 1.0:
        return math.log(budget / total) / math.log(rescaled[-1])
    if not rescaled or rescaled[-1] >= 1.0:  # a withdrawal alone: there is nothing to rescale
        least = cost(profile, [total if share > 0 else 0.0 for share in shares], measure)
        if measure != "final" and budget < math.floor(least):
            problem = f"profile {profile.name!r} only withdraws, which leaves {least:.1f} by {measure}"
            raise BudgetError(REQUEST_FIELD, budget, problem, f"give {math.floor(least)} to {total}")
        return 1.0

    def cost_at(power: float) -> float:
        return cost(profile, [total * share**power if share > 0 else 0.0 for share in shares], measure)

    if budget <= (floor := cost_floor(profile)):
        raise BudgetError(
            REQUEST_FIELD,
            budget,
            f"profile {profile.name!r} measures by {measure}, which cannot go below {floor:.1f} with its layers",
            f"give {math.floor(floor) + 1} to {total}, or use a profile of measure final",
        )
    low, high = 0.0, 1.0
    while cost_at(high) > budget:  # ends, for the limit is the floor
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if cost_at(middle) > budget else (low, middle)
    return high


def segment_tokens(profile: Profile, counts: Sequence[float]) -> tuple[float, ...]:
    """Visual tokens of one image in each segment of decoder layers, given the counts after each reducer."""
    return tuple(counts) if profile.before is not None else (profile.model.visual_tokens, *counts)


def cost(profile: Profile, counts: Sequence[float], measure: BudgetMeasure) -> float:
    """What counts after each reducer come to by a measure, in visual tokens that every layer would carry instead."""
    if measure == "final":
        left = [n for n, reducer in zip(counts, profile.reducers, strict=True) if not isinstance(reducer, Withdrawal)]
        return left[-1] if left else profile.model.visual_tokens
    if measure == "flops":
        assert profile.model.flops_crossover is not None
        return _tokens_of_flops(mean_layer_flops(profile, counts), profile.model.flops_crossover)
    return layer_average(profile, counts)


def layer_average(profile: Profile, counts: Sequence[float]) -> float:
    """Mean over decoder layers of the visual tokens that a layer caches, given the counts after each reducer."""
    layers = profile.segment_layers()
    return sum(n * tokens for n, tokens in zip(layers, segment_tokens(profile, counts), strict=True)) / sum(layers)


def mean_layer_flops(profile: Profile, counts: Sequence[float]) -> float:
    """Mean over decoder layers of prefill FLOPs, with :data:`TEXT_TOKENS` of text, in those of one token's matrices."""
    crossover = profile.model.flops_crossover
    assert crossover is not None
    layers, tokens = profile.segment_layers(), segment_tokens(profile, counts)
    return sum(n * _layer_flops(k, crossover) for n, k in zip(layers, tokens, strict=True)) / sum(layers)


def _layer_flops(visual: float, crossover: int) -> float:
    tokens = visual + TEXT_TOKENS
    return tokens * (1 + tokens / crossover)


def _tokens_of_flops(flops: float, crossover: int) -> float:
    """Inverse of :func:`_layer_flops`."""
    return (math.sqrt(1 + 4 * flops / crossover) - 1) * crossover / 2 - TEXT_TOKENS


def cost_floor(profile: Profile) -> float:
    """Limit of the cost for ever smaller budgets, by the profile's measure: what stands before the first discard."""
    total = profile.model.visual_tokens
    return cost(profile, [total if s >= 1.0 else 0.0 for s in _cumulative_shares(profile)], profile.budget.measure)


def flops_share(profile: Profile, counts: Sequence[float]) -> float | None:
    """Prefill FLOPs of the decoder over stock's; None where the profile does not know the model's sizes."""
    if profile.model.flops_crossover is None:
        return None
    return mean_layer_flops(profile, counts) / _layer_flops(profile.model.visual_tokens, profile.model.flops_crossover)


def measures(profile: Profile, counts: Sequence[int]) -> str:
    """All measures of some counts in words, cost first."""
    average = layer_average(profile, counts)
    flops = flops_share(profile, counts)
    return (
        f"layer average {average:.1f}, visual KV {average / profile.model.visual_tokens:.1%} of stock's"
        + (f", prefill FLOPs {flops:.1%}" if flops is not None else "")
        + f", final {cost(profile, counts, 'final'):.0f}"
    )


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
