"""The space that random search and TPE share: where, how much and which, of one cost."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eos_search.opponents.base import Chooser
from eos_search.opponents.costs import at_costs, draft_profile, latest_first_layer, prune_reducer
from eos_search.selectors import NAMED
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.profile import BEFORE, ModelSpec, Profile

_NONE = "none"
_DROP, _MIX = "drop", "mix"
# Logarithm of the share that a reducer drops of the cost, as a ratio: only ratios count.
_WEIGHTS = (0.1, 10.0)
# From hardly any transfer to Eq. 3 at its full strength, and from one anchor for each token to all of them alike.
_GAMMA, _TAU = (0.01, 1.0), (0.02, 10.0)


@dataclass(frozen=True)
class Space:
    """Profiles of a model that have the given costs.

    Attributes:
        model: with a fixed number of visual tokens.
        costs: layer averages in tokens.
        max_reducers: most reducers, one before the decoder included.
        selectors: names in :data:`~eos_search.selectors.NAMED`; none: no reducer before the decoder.
        queries: query rules to choose from.
        minimums: least counts to choose from, ascending from 1; each but 1 only where the costs allow it.
    """

    model: ModelSpec
    costs: tuple[int, ...]
    max_reducers: int
    selectors: tuple[str, ...]
    queries: tuple[str, ...]
    minimums: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.latest is None and not self.selectors:
            depth, visual = self.model.num_decoder_layers, self.model.visual_tokens or 0
            problem = f"layer 0 alone sees {visual} tokens, {visual / depth:.1f} on average over {depth} layers"
            raise SettingError("cost", min(self.costs), problem, "give more, or selectors before the decoder")

    @cached_property
    def latest(self) -> int | None:
        """The last layer behind which a first reducer inside the decoder can meet every cost."""
        return latest_first_layer(self.model, min(self.costs))

    def draw(self, choose: Chooser) -> Profile:
        """The profile of a point; every point has one."""
        before = self._before(choose)
        layers = self._layers(choose, before is not None)
        reducers = [] if before is None else [self._reducer(choose, 0, BEFORE, bool(layers))]
        if before is not None:
            reducers[0]["select"] = NAMED[before]
        for k, layer in enumerate(layers, start=len(reducers)):
            reducers.append(self._reducer(choose, k, layer, len(layers) + len(reducers) > 1))
        queries = choose.one_of("queries", self.queries) if layers else "image"
        minimum = int(choose.one_of("minimum", tuple(map(str, self.minimums)))) if len(self.minimums) > 1 else 1
        draft = functools.partial(draft_profile, self.model, reducers, self.costs[0], queries)
        try:
            return at_costs(draft(minimum), self.costs)
        except BudgetError:  # it alone costs more
            return at_costs(draft(1), self.costs)

    def _before(self, choose: Chooser) -> str | None:
        if not self.selectors:
            return None
        options = self.selectors if self.latest is None else (_NONE, *self.selectors)
        before = choose.one_of("before", options)
        return None if before == _NONE else before

    def _layers(self, choose: Chooser, behind: bool) -> list[int]:
        """Layers inside the decoder, ascending; none only behind a selector."""
        places = self.model.num_decoder_layers - 1
        most = min(self.max_reducers - behind, places)
        # Names stand for one range each: what a sampler has learned of one would be wrong in another.
        number = choose.whole("reducers behind", 0, most) if behind else choose.whole("reducers", 1, most)
        layers: list[int] = []
        for k in range(number):
            low, high = layers[-1] + 1 if layers else 0, places - number + k
            if k == 0 and not behind:
                assert self.latest is not None
                high = min(high, self.latest)
            share = choose.number(f"place {k}", 0.0, 1.0)
            layers.append(min(low + math.floor(share * (high - low + 1)), high))
        return layers

    def _reducer(self, choose: Chooser, k: int, layer: int, shares: bool) -> dict[str, Any]:
        """Plain data of reducer ``k``; ``shares``: it is not the only one, so that its part of the reduction counts."""
        weight = choose.number(f"weight {k}", *_WEIGHTS, log=True) if shares else 1.0
        reducer: dict[str, Any] = prune_reducer(layer, -math.expm1(-weight))
        if choose.one_of(f"operator {k}", (_DROP, _MIX)) == _DROP:
            return reducer
        return reducer | {
            "gamma": choose.number(f"gamma {k}", *_GAMMA, log=True),
            "tau": choose.number(f"tau {k}", *_TAU, log=True),
            "theta": choose.number(f"theta {k}", -1.0, 1.0),
            "rho": choose.number(f"rho {k}", 0.0, 1.0),
            "nu": choose.number(f"nu {k}", 0.0, 1.0),
        }


def check_names(field: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Whether all names are known, each once.

    Raises:
        SettingError: one is not, or stands there twice.
    """
    for name in given:
        if name not in known or given.count(name) > 1:
            problem = "stands there twice" if name in known else "is unknown"
            raise SettingError(field, name, problem, f"choose from {', '.join(known)}, each once")
