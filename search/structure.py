"""What a point Theta means as a hard reduction: the layers that act, the profile, and the counts of Eq. 11.

The search asks here before every forward pass, and the export asks here in the end: between the two there is no gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eos_search.measures import SearchMeasure
from eos_search.theta import KINDS, ThetaValues
from eos_vllm.core.budget import cost, eq11_counts, kept_counts
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import (
    BEFORE,
    SCHEMA,
    Budget,
    ImportanceSpec,
    ModelSpec,
    OperatorSpec,
    Profile,
    Reducer,
    Withdrawal,
    parse_profile,
)
from eos_vllm.core.selectors import Selector


@dataclass(frozen=True)
class Rules:
    """What the search does not learn.

    Attributes:
        model: what a profile says about the model.
        importance: query rule of the scores.
        operator: gate sharpness (beta) and norm.
        max_reducers: C, the most reducers that act.
        gate_threshold: a gate above it acts.
        minimum: Kmin of Eq. 11.
        select: what chooses the anchors of a reducer before the decoder; None: there is none.
        withdraw: layer behind which no visual token goes on; None: all that are left go on.
        measure: what a served budget counts, and the profile's own.
    """

    model: ModelSpec
    importance: ImportanceSpec = field(default_factory=ImportanceSpec)
    operator: OperatorSpec = field(default_factory=OperatorSpec)
    max_reducers: int = 3
    gate_threshold: float = 0.5
    minimum: int = 1
    select: Selector | None = None
    withdraw: int | None = None
    measure: SearchMeasure = "final"

    def values(self, table: torch.Tensor) -> ThetaValues:
        """Values ``[L, 7]`` with these rules; one row more where something is selected before the decoder."""
        return ThetaValues(table, self.select is not None)


@dataclass(frozen=True)
class Structure:
    """The hard reading of one point Theta.

    Attributes:
        acting: layers whose gate acts, ascending, -1 first where a reducer stands before the decoder; a withdrawal is
            none of them.
        counts: visual tokens of an image left after each of them.
        profile: the profile that says the same; None where nothing is reduced.
        candidates: for each other place, the count that it would leave behind if its gate acted.
        budget: the retain budget that the counts are scaled to, by the measure of the rules; None: they are those of
            Eq. 11.
    """

    acting: tuple[int, ...]
    counts: tuple[int, ...]
    profile: Profile | None
    candidates: dict[int, int]
    budget: int | None = None

    @property
    def before(self) -> bool:
        """Whether a reducer stands before the decoder."""
        return self.acting[:1] == (BEFORE,)


def acting_layers(gates: list[float], rules: Rules) -> tuple[int, ...]:
    """The at most C layers whose gates are above the threshold; the highest gates win, equal ones by lower layer.

    ``gates`` are those of the decoder's layers; the last one, and those behind a withdrawal, are no places.
    """
    above = [layer for layer in places(len(gates), rules) if gates[layer] > rules.gate_threshold]
    return tuple(sorted(sorted(above, key=lambda layer: -gates[layer])[: rules.max_reducers]))


def places(depth: int, rules: Rules) -> range:
    """Decoder layers behind which a reducer may stand."""
    return range(depth - 1 if rules.withdraw is None else rules.withdraw)


def acting_of(values: ThetaValues, rules: Rules) -> tuple[int, ...]:
    """:attr:`Structure.acting` of a point."""
    inside = acting_layers(values.gate[: values.depth].tolist(), rules)
    return (BEFORE, *inside) if values.before else inside


def read_structure(values: ThetaValues, rules: Rules, budget: int | None = None) -> Structure:
    """Reads a point as a hard reduction; the only place where numbers of Theta go to the host.

    Args:
        values: the point.
        rules: what is not learned.
        budget: serve this retain budget, as a request may ask for; the counts then follow by the profile's rule
            (paper 2.6). None: the counts of Eq. 11.
    """
    rows = values.table.detach().tolist()
    inside = acting_layers([row[0] for row in rows[: values.depth]], rules)
    acting = (BEFORE, *inside) if values.before else inside
    profile = _profile(rows, acting, rules) if acting or rules.withdraw is not None else None
    if profile is not None and budget is not None:
        profile = _served(profile, budget)
    counts = () if profile is None else kept_counts(profile)[: len(acting)]
    candidates: dict[int, int] = {}
    tokens = counts[0] if values.before else rules.model.visual_tokens
    assert tokens is not None  # the search is for a fixed number
    for layer in places(values.depth, rules):
        if layer in acting:
            tokens = counts[acting.index(layer)]
        else:
            candidates[layer] = _count_if_acting(layer, rows[layer], tokens, rules)
    return Structure(acting, counts, profile, candidates, budget)


def unmet_budget(values: ThetaValues, rules: Rules, budgets: Sequence[int]) -> int | None:
    """The first served budget that the layers which act cannot have: they would be judged at a higher cost."""
    for budget in budgets:
        profile = read_structure(values, rules, budget).profile
        if profile is not None and cost(profile, kept_counts(profile), rules.measure) > budget + 1:
            return budget
    return None


def _reducer(layer: int, row: list[float], rules: Rules) -> Reducer:
    select = {"select": rules.select} if layer == BEFORE else {}
    return Reducer.model_validate({"layer": layer, **select, **dict(zip(KINDS, row, strict=True))})


def _profile(rows: list[list[float]], acting: tuple[int, ...], rules: Rules) -> Profile:
    """The counts of Eq. 11 are written down as the schedule of the budget that they end in: plans follow them."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "name": "search",
        "model": rules.model.model_dump(),
        "importance": rules.importance.model_dump(),
        "operator": rules.operator.model_dump(),
        "reducers": [_reducer(layer, rows[layer], rules).model_dump() for layer in acting],
        "budget": {"measure": "final", "tokens": rules.model.visual_tokens, "minimum": rules.minimum},
    }
    if rules.withdraw is not None:
        data["reducers"].append({"layer": rules.withdraw, "withdraw": True})
    counts = eq11_counts(draft := parse_profile(data))
    tokens = max(1, round(cost(draft, counts, rules.measure)))
    data["budget"] = {"measure": rules.measure, "tokens": tokens, "minimum": rules.minimum}
    return parse_profile({**data, "schedules": {str(tokens): list(counts)}})


def _served(profile: Profile, budget: int) -> Profile:
    """The profile at another budget of its measure; at the least that its layers can cost, where that is more."""
    served = profile.model_copy(update={"budget": profile.budget.model_copy(update={"tokens": budget})})
    if profile.budget.measure == "final":
        return served
    served = served.model_copy(update={"schedules": {}})
    try:
        kept_counts(served)
    except BudgetError:
        least = [0 if isinstance(r, Withdrawal) else profile.budget.minimum for r in profile.reducers]
        return served.model_copy(update={"schedules": {str(budget): tuple(least)}})
    return served


def _count_if_acting(layer: int, row: list[float], tokens: int, rules: Rules) -> int:
    """Eq. 11 for a gate just above the threshold, where a closed gate would begin to act."""
    gate = max(row[0], rules.gate_threshold)
    alone = Profile.model_construct(
        model=ModelSpec.model_construct(visual_tokens=tokens),
        reducers=(_reducer(layer, [gate, *row[1:]], rules),),
        budget=Budget(tokens=1, minimum=rules.minimum),
    )
    return eq11_counts(alone)[0]
