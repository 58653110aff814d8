"""Counts at each served budget, chosen by the hard loss.

One power for the shares of all reducers (paper 2.6) takes a profile from its own budget to any other, and knows nothing
of images. Yet answers depend on single counts: every n-th patch of a grid 24 wide stands in the same columns again
where 24 is a multiple of n, so that 64 patches may say more than 72. Here the first reducer leaves some more or fewer
than that power would have it, the others what then meets the same budget, and rows of the data that no step has seen
say which is best: by the probability of the answer's tokens, their geometric mean. What is better by less than its
standard error is left alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from eos_search.examples import Broken
from eos_search.moves import best_gain
from eos_search.structure import Rules, Structure, read_structure
from eos_search.theta import ThetaValues
from eos_vllm.core.budget import cost
from eos_vllm.core.profile import Profile, Withdrawal

Counts = tuple[int, ...]
Loss = Callable[[Any, ThetaValues, Structure], float]
# The first count over that of the rule: steps of 1.7 % (a token in 59), to an eighth more or less.
_FACTORS = tuple(math.exp(step * 0.017) for step in range(-7, 8) if step)
# Of the rows a quarter is asked with all counts, the rest with the best of them.
_FIRST_SHARE = 4
_ONE_OF = 4
# Of whole tokens a measure may be off by half a token.
_OFF = 0.5
_HALVINGS = 40


def fit_schedules(
    values: ThetaValues,
    rules: Rules,
    budgets: Sequence[int],
    rows: Sequence[Any],
    loss: Loss,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, Counts]:
    """The counts for each budget, as schedules of a profile; those of a withdrawal are 0.

    Args:
        values: the searched point.
        rules: what is not learned.
        budgets: retain budgets in tokens, by the measure of the rules.
        rows: of this process; broken ones are left out.
        loss: of a row under a hard reduction.
        add_up: sums over all processes, which agree on every choice.
    """
    whole = [row for row in rows if not isinstance(row, Broken)]
    first = math.ceil(len(whole) / _FIRST_SHARE)
    found = {}
    for budget in budgets:
        structure = read_structure(values, rules, budget)
        profile, counts = structure.profile, structure.counts
        if profile is None or not counts:
            continue
        every = list(other_counts(profile, counts, budget, rules))
        if every:
            asked = _Asked(values, structure, profile, loss, add_up)
            asked.ask([counts, *every], whole[:first])
            ahead = asked.best(every, math.ceil(len(every) / _ONE_OF))
            asked.ask([counts, *ahead], whole[first:])
            counts = asked.surely_better(counts, ahead) or counts
        found[str(budget)] = _schedule(profile, counts)
    return found


def other_counts(profile: Profile, own: Counts, budget: int, rules: Rules) -> Iterator[Counts]:
    """Counts of the same cost whose first one is another; none where one reducer alone has to meet the budget.

    Args:
        profile: gives layers, and the shares that the reducers behind the first divide what is left by.
        own: those of the rule, without a withdrawal.
        budget: retain budget.
        rules: measure, minimum and tokens of an image.
    """
    total = rules.model.visual_tokens
    assert total is not None  # the search is for a fixed number
    seen = {own}
    for factor in _FACTORS:
        first = round(own[0] * factor)
        if not min(rules.minimum, total) <= first <= total:
            continue
        counts = _meeting(profile, first, len(own), budget, rules)
        if counts is not None and counts not in seen:
            seen.add(counts)
            yield counts


def _meeting(profile: Profile, first: int, reducers: int, budget: int, rules: Rules) -> Counts | None:
    """The counts that begin with ``first`` and meet the budget; None where there are none."""
    behind = [reducer.retain for reducer in profile.reducers[1:reducers]]

    def at(power: float) -> Counts:
        counts, share = [first], 1.0
        for retain in behind:
            share *= retain
            counts.append(min(counts[-1], max(rules.minimum, math.floor(first * share**power + 0.5))))
        return tuple(counts)

    def off(counts: Counts) -> float:
        return cost(profile, _schedule(profile, counts), rules.measure) - budget

    if not behind or not all(0 < retain < 1 for retain in behind):
        return None
    low, high = 0.0, 1.0
    while off(at(high)) > 0 and max(at(high)[1:]) > rules.minimum:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if off(at(middle)) > 0 else (low, middle)
    best = min((at(low), at(high)), key=lambda counts: abs(off(counts)))
    return best if abs(off(best)) <= _OFF else None


def _schedule(profile: Profile, counts: Counts) -> Counts:
    """The counts of all reducers, those of a withdrawal with them."""
    return (*counts, *(0 for reducer in profile.reducers if isinstance(reducer, Withdrawal)))


class _Asked:
    """Losses of rows under several counts."""

    def __init__(
        self,
        values: ThetaValues,
        structure: Structure,
        profile: Profile,
        loss: Loss,
        add_up: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.values, self.structure, self.profile, self.loss, self.add_up = values, structure, profile, loss, add_up
        self.losses: dict[Counts, list[float]] = {}

    @torch.no_grad()
    def ask(self, every: Sequence[Counts], rows: Sequence[Any]) -> None:
        for counts in every:
            schedule = {str(self.structure.budget): _schedule(self.profile, counts)}
            profile = self.profile.model_copy(update={"schedules": schedule})
            hard = replace(self.structure, counts=counts, profile=profile)
            # Bounded: a single row says little, however sure the model is of a wrong answer.
            taken = [-math.exp(-self.loss(row, self.values, hard)) for row in rows]
            self.losses.setdefault(counts, []).extend(taken)

    def best(self, every: Sequence[Counts], number: int) -> list[Counts]:
        sums = self.add_up(torch.tensor([sum(self.losses[counts]) for counts in every], dtype=torch.float64))
        order = sorted(range(len(every)), key=lambda index: sums[index].item())
        return [every[index] for index in order[:number]]

    def surely_better(self, own: Counts, others: Sequence[Counts]) -> Counts | None:
        losses = torch.tensor([self.losses[counts] for counts in (own, *others)], dtype=torch.float64)
        return best_gain(others, losses, [0.0] * (1 + len(others)), self.add_up)
