"""One knob at a time: hand-made profiles with their query rule, transfer and schedule tuned by grids.

The stages go on from what the ones before have found, so that a budget buys the most telling ones first:

1. every hand-made profile, and plain pruning at its places, with each query rule;
2. at the three best of these places: pooling and merging with gamma from a grid;
3. the best of each profile, and of pooling and merging, with other schedules, and with other least counts.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from eos_search.ablations.variants import relocated
from eos_search.corners import at_corner
from eos_search.opponents.base import Candidate, Outcome
from eos_search.opponents.costs import at_costs, latest_first_layer, reduces
from eos_search.raw import digest
from eos_vllm import profiles
from eos_vllm.analysis.comparison import measured_by
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.errors import BudgetError, EosError
from eos_vllm.core.profile import Profile, Withdrawal, check_fits, parse_profile
from eos_vllm.core.selectors import LAST
from eos_vllm.models.geometry import ModelGeometry

GAMMAS = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
# What each reducer takes out, over what the one before it does, as logarithms of shares.
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
PLACES = 3
_FULL_SIZE = "-llava-1.5-7b"
_PAPERS = "eos-llava-1.5-7b"


class OneKnob:
    """Three stages of grids, then an end. A group is a stage, in an order that the seed decides."""

    def __init__(
        self,
        bases: Sequence[Profile],
        costs: Sequence[int],
        queries: Sequence[str],
        seed: int,
        minimums: Sequence[int] = (1,),
    ) -> None:
        """What is tuned.

        Args:
            bases: profiles by ``layer_average`` without schedules.
            costs: layer averages in tokens; bases that cannot meet them even from the first layers on are left out.
            queries: query rules to choose from.
            seed: of the order, which matters where the budget ends within a stage.
            minimums: least counts to choose from.
        """
        self.costs, self.queries, self.seed = tuple(costs), tuple(queries), seed
        self.minimums = tuple(minimums)
        moved = (_moved_to_meet(base, min(costs)) for base in bases)
        self.bases = [base for base in moved if base is not None]
        self.found: list[Outcome] = []
        # What each candidate was made from, by what it does: its own shares are rounded to whole tokens.
        self.drafts: dict[str, Profile] = {}
        self.known: set[str] = set()
        self.stages = iter((self._rules, self._transfers, self._schedules))

    def propose(self) -> list[Candidate]:
        """As :class:`~eos_search.opponents.base.Opponent`."""
        for stage in self.stages:
            group = []
            for profile, about in stage():
                try:
                    met = at_costs(profile, self.costs)
                except BudgetError:  # one that withdraws an image cannot cost as much as others
                    continue
                # Another least count that changes none is no other candidate.
                same = digest(_with_minimum(met, 1))
                if same not in self.known:
                    self.known.add(same)
                    self.drafts[digest(met)] = profile
                    group.append(Candidate(met, about))
            if group:
                random.Random(f"one-knob/{self.seed}").shuffle(group)
                return group
        return []

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """As :class:`~eos_search.opponents.base.Opponent`."""
        self.found += outcomes

    def _rules(self) -> Iterator[tuple[Profile, dict[str, Any]]]:
        """Stage 1."""
        whole = list(self.bases)
        pruned = {_places(base) for base in whole if _prunes(base)}
        for base in self.bases:
            if _places(base) not in pruned:
                pruned.add(_places(base))
                whole.append(at_corner(base, "prune"))
        for base in whole:
            for rule in self.queries if _asks(base) else (base.importance.queries,):
                yield _asked(base, rule), {"base": base.name, "queries": rule}

    def _transfers(self) -> Iterator[tuple[Profile, dict[str, Any]]]:
        """Stage 2."""
        best: dict[str, Outcome] = {}
        for outcome in self._ranked():
            selector = outcome.candidate.profile.selector
            if selector is None or not selector.mixes:
                best.setdefault(_places(outcome.candidate.profile), outcome)
        for outcome in list(best.values())[:PLACES]:
            about = outcome.candidate.about
            for corner in ("pool", "merge"):
                corner_profile = at_corner(self._draft(outcome), corner)
                for gamma in GAMMAS:
                    name = f"{corner} at {about['base']}"
                    yield _with_gamma(corner_profile, gamma), {**about, "base": name, "gamma": gamma}

    def _schedules(self) -> Iterator[tuple[Profile, dict[str, Any]]]:
        """Stage 3."""
        best: dict[str, Outcome] = {}
        for outcome in self._ranked():
            best.setdefault(outcome.candidate.about["base"], outcome)
        for outcome in best.values():
            draft = self._draft(outcome)
            for ratio in RATIOS if len(reduces(draft)) > 1 else ():
                yield _with_ratio(draft, ratio), {**outcome.candidate.about, "ratio": ratio}
            for minimum in self.minimums:
                if minimum != draft.budget.minimum:
                    yield _with_minimum(draft, minimum), {**outcome.candidate.about, "minimum": minimum}

    def _draft(self, outcome: Outcome) -> Profile:
        return self.drafts[digest(outcome.candidate.profile)]

    def _ranked(self) -> list[Outcome]:
        """Best first; of equals the one that was proposed first."""
        return sorted(self.found, key=lambda outcome: outcome.rank, reverse=True)


def hand_made(sizes: ModelGeometry) -> list[Profile]:
    """The packaged profiles for a model that no search has made, ours or the paper's, by ``layer_average`` and without
    schedules.

    Where none was made for the model, those for LLaVA-1.5-7B are scaled to it.
    """
    packaged = [profiles.load(name) for name in profiles.names()]
    by_hand = [profile for profile in packaged if not _was_searched(profile)]
    fitting = [profile for profile in by_hand if _fits(profile, sizes)]
    if not fitting:
        for profile in by_hand:
            # A tower of other depth need not have the layers that a selector names.
            named = [] if profile.selector is None else [n for n in profile.selector.reads_layers() if n != LAST]
            if profile.name.endswith(_FULL_SIZE) and not named:
                fitting += _scaled(measured_by(profile, "layer_average", sizes), sizes)
    return [measured_by(profile, "layer_average", sizes) for profile in fitting]


def _was_searched(profile: Profile) -> bool:
    """Whether a search found it: one of ours, or the paper's."""
    return str(profile.provenance.get("command", "")).startswith("eos-search") or profile.name == _PAPERS


def _fits(profile: Profile, sizes: ModelGeometry) -> bool:
    try:
        check_fits(profile, sizes)
    except EosError:
        return False
    return True


def _scaled(profile: Profile, sizes: ModelGeometry) -> list[Profile]:
    """The profile for a model of other sizes, whatever its budget; none where it cannot be."""
    # The smallest reduction there is: the budget that counts is met later.
    data = profile.to_dict()
    data["budget"]["tokens"] = (profile.model.visual_tokens or 0) - 1
    try:
        draft = parse_profile(data, profile.name)
        return [scale_to_model(draft, sizes.num_decoder_layers, sizes.visual_tokens, profile.name)]
    except EosError:
        return []


def _moved_to_meet(base: Profile, cost: int) -> Profile | None:
    """The profile with its reducers moved forward, all by as many layers, as far as the cost needs."""
    if base.before is not None:
        return base
    latest = latest_first_layer(base.model, cost)
    if latest is None:
        return None
    return relocated(base, [layer - max(0, base.layers[0] - latest) for layer in base.layers])


def _places(profile: Profile) -> str:
    """Where a profile reduces, and by which selector."""
    return f"{profile.layers} {profile.selector!r} {isinstance(profile.reducers[-1], Withdrawal)}"


def _prunes(profile: Profile) -> bool:
    return all(profile.params_of(reducer).is_identity for reducer in profile.reducers)


def _asks(profile: Profile) -> bool:
    """Whether any reducer chooses by attention inside the decoder."""
    return any(not isinstance(reducer, Withdrawal) for reducer in profile.inside)


def _asked(profile: Profile, rule: str) -> Profile:
    data = profile.to_dict()
    data["importance"]["queries"] = rule
    if rule == "image":
        data["importance"].pop("window", None)
    return parse_profile(data, profile.name)


def _with_gamma(profile: Profile, gamma: float) -> Profile:
    data = profile.to_dict()
    for i in reduces(profile):
        data["reducers"][i]["gamma"] = gamma
    return parse_profile(data, profile.name)


def _with_minimum(profile: Profile, minimum: int) -> Profile:
    return profile.model_copy(update={"budget": profile.budget.model_copy(update={"minimum": minimum})})


def _with_ratio(profile: Profile, ratio: float) -> Profile:
    """Reducers whose shares are powers of one another; which power meets the cost is found later."""
    data = profile.to_dict()
    for k, i in enumerate(reduces(profile)):
        data["reducers"][i].update(gate=1.0, discard=-math.expm1(-(ratio**k)))
    return parse_profile(data, profile.name)
