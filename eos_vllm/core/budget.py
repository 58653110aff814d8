"""From a retain budget to the number of tokens kept after each reducer (Eq. 11, paper 2.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eos_vllm.core.errors import BudgetError, ProfileError
from eos_vllm.core.profile import BudgetMeasure, Profile, Withdrawal

REQUEST_FIELD = "eos_retain"
# Text of the prompt whose FLOPs are compared, as the field does for LLaVA.
TEXT_TOKENS = 88
_EPSILON = 1e-9


@dataclass(frozen=True)
class Share:
    """A retain budget as a share of each image's own visual tokens, in (0, 1]: 0.11, or ``"11%"``."""

    value: float

    def __str__(self) -> str:
        return f"{100 * self.value:.6g}%"


RetainBudget = int | Share


def plain(budget: RetainBudget) -> int | float | str:
    """A budget as JSON has it, which :func:`parse_budget` reads again without loss: tokens, or a fraction."""
    if not isinstance(budget, Share):
        return budget
    return budget.value if budget.value < 1 else "100%"  # 1.0 would be a token


def _named(budget: RetainBudget) -> int | str:
    return str(budget) if isinstance(budget, Share) else budget


def tokens_of(budget: RetainBudget, total: int) -> float:
    """What a budget comes to in visual tokens of an image of ``total``; a share is not rounded, for counts are."""
    return budget.value * total if isinstance(budget, Share) else budget


def own_budget(profile: Profile) -> RetainBudget:
    """The budget that the profile itself names."""
    budget = profile.budget
    return Share(budget.share) if budget.share is not None else budget.tokens  # type: ignore[return-value]


def eq11_counts(profile: Profile, total: int | None = None) -> tuple[int, ...]:
    """Counts of the profile's own gates and discards, not rescaled: ``max(Kmin, floor((1 - g c) N))`` (Eq. 11).

    Args:
        profile: the operator profile.
        total: N; the profile's where None.
    """
    counts, tokens = [], image_size(profile, total)
    for reducer in profile.reducers:
        if isinstance(reducer, Withdrawal):
            counts.append(0)
            continue
        # The epsilon keeps products such as (1 - 0.55) * 400 from landing just below the whole number they mean.
        tokens = max(min(profile.budget.minimum, tokens), math.floor(reducer.retain * tokens + _EPSILON))
        counts.append(tokens)
    return tuple(counts)


def image_size(profile: Profile, total: int | None = None) -> int:
    """Visual tokens of an image: as given, else the profile's.

    Raises:
        ProfileError: a profile for images of any size, and no image.
    """
    total = profile.model.visual_tokens if total is None else total
    if total is None:
        problem = "it takes images of any size, and no image is known here"
        raise ProfileError("profile.model.visual_tokens", profile.name, problem, "name a profile of a fixed number")
    return total


def kept_counts(profile: Profile, budget: RetainBudget | None = None, total: int | None = None) -> tuple[int, ...]:
    """Visual tokens of one image left after each reducer.

    A published schedule wins; else every retain share is raised to the one power that meets the budget by the
    profile's measure (paper 2.6), the profile's minimum counted where the budget is in tokens; a share's power is the
    same for images of all sizes. A budget of the image's tokens or more means no reduction.

    Args:
        profile: the operator profile.
        budget: retain budget per image; the profile's own where None.
        total: visual tokens of the image; the profile's where None.

    Returns:
        One count per reducer, not increasing.

    Raises:
        BudgetError: the budget is below 1, or below what the measure can reach with these layers.
        ProfileError: no ``total``, of a profile for images of any size.
    """
    total = image_size(profile, total)
    budget = own_budget(profile) if budget is None else budget
    target = tokens_of(budget, total)
    if target < 1 and not isinstance(budget, Share):
        raise BudgetError(REQUEST_FIELD, budget, "a retain budget is at least 1", f"give 1 to {total}")
    if (schedule := profile.schedules.get(str(budget))) is not None:
        return schedule
    if target >= total:
        return (total,) * len(profile.reducers)
    shares = _cumulative_shares(profile)
    power = _power_for(profile, shares, budget, total)
    minimum = min(profile.budget.minimum, total)
    counts, previous = [], total
    for share in shares:
        if share > 0:
            previous = min(previous, max(minimum, math.floor(total * share**power + 0.5)))
        counts.append(previous if share > 0 else 0)
    return tuple(counts)


def kept_of_selected(profile: Profile, budget: RetainBudget, selected: int) -> tuple[int, ...]:
    """Counts after the reducers within the decoder of an image of any size that has ``selected`` tokens in the prompt.

    How many it had before is not known there, and with a budget that is a share need not be: the power that meets it
    is the same for all sizes.

    Raises:
        BudgetError: as :func:`kept_counts`, and for a budget in tokens.
    """
    if not isinstance(budget, Share):
        problem = "this profile selects before the decoder from images of any size: only a share is well defined"
        raise BudgetError(REQUEST_FIELD, budget, problem, 'give a share, such as "11%"')
    if budget.value >= 1:
        return (selected,) * len(profile.inside)
    shares = _cumulative_shares(profile)
    size = 1 << 20  # any: the power does not depend on it
    power = _power_for(profile, shares, budget, size)
    minimum = min(profile.budget.minimum, selected)
    counts, previous = [], selected
    for share in shares[1:]:
        if share > 0:
            previous = min(previous, max(minimum, math.floor(selected * (share / shares[0]) ** power + 0.5)))
        counts.append(previous if share > 0 else 0)
    return tuple(counts)


def _cumulative_shares(profile: Profile) -> list[float]:
    shares, share = [], 1.0
    for reducer in profile.reducers:
        share *= reducer.retain
        shares.append(share)
    return shares


def _power_for(profile: Profile, shares: list[float], budget: RetainBudget, total: int) -> float:
    measure, target = profile.budget.measure, tokens_of(budget, total)
    asks_share = isinstance(budget, Share)

    def range_from(tokens: float) -> str:
        return f"{100 * tokens / total:.4g}% to 100%" if asks_share else f"{math.ceil(tokens)} to {total}"

    if all(share >= 1.0 for share in shares):
        raise BudgetError(
            REQUEST_FIELD,
            _named(budget),
            f"no reducer of profile {profile.name!r} discards anything",
            f"give {'100%' if asks_share else total}, or a profile whose gate*discard is above 0 somewhere",
        )
    rescaled = [share for share in shares if share > 0]
    if measure == "final" and rescaled and rescaled[-1] < 1.0:
        # A share's own value, so that the power is the same for images of all sizes, to the last bit.
        share = budget.value if isinstance(budget, Share) else target / total
        return math.log(share) / math.log(rescaled[-1])
    if not rescaled or rescaled[-1] >= 1.0:  # a withdrawal alone: there is nothing to rescale
        least = cost(profile, [total if share > 0 else 0.0 for share in shares], measure, total)
        if measure != "final" and target < math.floor(least):
            problem = f"profile {profile.name!r} only withdraws, which leaves {least:.1f} of {total} by {measure}"
            raise BudgetError(REQUEST_FIELD, _named(budget), problem, f"give {range_from(math.floor(least))}")
        return 1.0

    minimum = 0.0 if asks_share else float(min(profile.budget.minimum, total))

    def cost_at(power: float) -> float:
        counts = [max(total * share**power, minimum) if share > 0 else 0.0 for share in shares]
        return cost(profile, counts, measure, total)

    if target <= (floor := cost_floor(profile, total)):
        raise BudgetError(
            REQUEST_FIELD,
            _named(budget),
            f"profile {profile.name!r} measures by {measure}, which cannot go below {floor:.1f} of an image's {total} "
            "tokens with its layers",
            f"give {range_from(floor * 1.01 if asks_share else math.floor(floor) + 1)}, or use measure final",
        )
    # Where every count is at the minimum, a smaller budget changes nothing.
    least = cost(profile, [total if s >= 1.0 else minimum if s > 0 else 0.0 for s in shares], measure, total)
    target = max(target, least)
    low, high = 0.0, 1.0
    while cost_at(high) > target:  # ends, for the limit is below, or reached
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if cost_at(middle) > target else (low, middle)
    return high


def segment_tokens(profile: Profile, counts: Sequence[float], total: int | None = None) -> tuple[float, ...]:
    """Visual tokens of one image in each segment of decoder layers, given the counts after each reducer.

    Here and below ``total`` is the image's number of visual tokens, the profile's where None.
    """
    return tuple(counts) if profile.before is not None else (image_size(profile, total), *counts)


def cost(profile: Profile, counts: Sequence[float], measure: BudgetMeasure, total: int | None = None) -> float:
    """What counts after each reducer come to by a measure, in visual tokens that every layer would carry instead."""
    if measure == "final":
        left = [n for n, reducer in zip(counts, profile.reducers, strict=True) if not isinstance(reducer, Withdrawal)]
        return left[-1] if left else image_size(profile, total)
    if measure == "flops":
        assert profile.model.flops_crossover is not None
        return _tokens_of_flops(mean_layer_flops(profile, counts, total), profile.model.flops_crossover)
    return layer_average(profile, counts, total)


def layer_average(profile: Profile, counts: Sequence[float], total: int | None = None) -> float:
    """Mean over decoder layers of the visual tokens that a layer caches, given the counts after each reducer."""
    layers, tokens = profile.segment_layers(), segment_tokens(profile, counts, total)
    return sum(n * k for n, k in zip(layers, tokens, strict=True)) / sum(layers)


def mean_layer_flops(profile: Profile, counts: Sequence[float], total: int | None = None) -> float:
    """Mean over decoder layers of prefill FLOPs, with :data:`TEXT_TOKENS` of text, in those of one token's matrices."""
    crossover = profile.model.flops_crossover
    assert crossover is not None
    layers, tokens = profile.segment_layers(), segment_tokens(profile, counts, total)
    return sum(n * _layer_flops(k, crossover) for n, k in zip(layers, tokens, strict=True)) / sum(layers)


def _layer_flops(visual: float, crossover: int) -> float:
    tokens = visual + TEXT_TOKENS
    return tokens * (1 + tokens / crossover)


def _tokens_of_flops(flops: float, crossover: int) -> float:
    """Inverse of :func:`_layer_flops`."""
    return (math.sqrt(1 + 4 * flops / crossover) - 1) * crossover / 2 - TEXT_TOKENS


def cost_floor(profile: Profile, total: int | None = None) -> float:
    """Limit of the cost for ever smaller budgets, by the profile's measure: what stands before the first discard."""
    total = image_size(profile, total)
    left = [total if s >= 1.0 else 0.0 for s in _cumulative_shares(profile)]
    return cost(profile, left, profile.budget.measure, total)


def flops_share(profile: Profile, counts: Sequence[float], total: int | None = None) -> float | None:
    """Prefill FLOPs of the decoder over stock's; None where the profile does not know the model's sizes."""
    if (crossover := profile.model.flops_crossover) is None:
        return None
    return mean_layer_flops(profile, counts, total) / _layer_flops(image_size(profile, total), crossover)


def measures(profile: Profile, counts: Sequence[int], total: int | None = None) -> str:
    """All measures of some counts in words, cost first."""
    average, flops = layer_average(profile, counts, total), flops_share(profile, counts, total)
    return (
        f"layer average {average:.1f}, visual KV {average / image_size(profile, total):.1%} of stock's"
        + (f", prefill FLOPs {flops:.1%}" if flops is not None else "")
        + f", final {cost(profile, counts, 'final', total):.0f}"
    )


def parse_budget(value: Any, field: str = REQUEST_FIELD) -> RetainBudget:
    """A budget as a flag, an option or a request gives it.

    Args:
        value: whole number of tokens (as text, too, or a float that is exactly one), or a share of each image's
            tokens: a fraction between 0 and 1, or text such as ``"11%"``.
        field: name to blame.

    Returns:
        Tokens, at least 1, or a share in (0, 1]. Tokens above the image's are allowed and mean no reduction.

    Raises:
        BudgetError: another type, neither whole nor a share, or out of range.
    """
    remedy = 'give a whole number of visual tokens per image, 1 or more, or a share such as 0.11 or "11%"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BudgetError(field, value, f"a {type(value).__name__} is no number", remedy)
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            return _share(float(value.strip().removesuffix("%")) / 100, value, field, remedy)
        number = float(value) if isinstance(value, str) and "." in value else value
        if isinstance(number, float) and 0 < number < 1:
            return Share(number)
        tokens = int(value)
        exact = isinstance(value, str) or tokens == value
    except (ValueError, OverflowError):
        raise BudgetError(field, value, "this is no whole number, and no share", remedy) from None
    if not exact:
        raise BudgetError(field, value, "this is no whole number, and no share", remedy)
    if tokens < 1:
        raise BudgetError(field, value, "a retain budget is at least 1", remedy)
    return tokens


def parse_tokens(value: Any, field: str = REQUEST_FIELD) -> int:
    """As :func:`parse_budget`, where only a number of tokens will do.

    Raises:
        BudgetError: as there, and for a share.
    """
    budget = parse_budget(value, field)
    if isinstance(budget, Share):
        problem = "a share is not taken here"
        raise BudgetError(field, value, problem, "give a whole number of visual tokens per image, 1 or more")
    return budget


def _share(value: float, given: Any, field: str, remedy: str) -> Share:
    if not 0 < value <= 1:
        raise BudgetError(field, given, "a share lies above 0% and is at most 100%", remedy)
    return Share(value)
