"""Budgets that follow the load: each request gets one as it arrives, by the time that images take and free KV blocks.

A server that falls behind can queue, or keep fewer tokens. The choice falls once, in the scheduler, and is written into
the request as if the client had named it: the worker plans from the same number, a preempted request keeps it, and the
prefix cache tells it apart. Requests that name a budget of their own are left alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eos_vllm.core.budget import RetainBudget, Share, parse_budget, tokens_of
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.serving.elastic_load import ImageLoad

FLAG = "eos-elastic"
# A request's own floor, in vllm_xargs.
LEAST_FIELD = "eos_retain_min"
_LEVELS = 4
# Share of an engine's time that prefilling may take for requests that find it busy: what is left is for the others, for
# decoding, and for chance, by which many come at once. Going up needs a lower one, so that a budget doesn't swing.
_SHARE, _UP = 0.35, 0.9
# Share of the free KV blocks that may be promised to what waits.
_PROMISED = 0.9
# A chat's next turn finds its blocks under the budget of the last one. Images are remembered for so many arrivals.
_REMEMBERED = 256


def parse_range(value: Any) -> tuple[RetainBudget, RetainBudget]:
    """Floor and ceiling from text such as ``64:192`` or ``10%:40%``.

    Raises:
        SettingError: it is no such text, or the floor is not below the ceiling.
        BudgetError: one of the two is no budget.
    """
    low, colon, high = str(value).partition(":")
    if not colon:
        raise SettingError(FLAG, value, "this is no range", "give floor and ceiling, such as 64:192 or 10%:40%")
    floor, ceiling = parse_budget(low, FLAG), parse_budget(high, FLAG)
    if isinstance(floor, Share) != isinstance(ceiling, Share):
        raise SettingError(FLAG, value, "one is a share, the other tokens", "give two of a kind")
    if tokens_of(floor, 1) >= tokens_of(ceiling, 1):
        raise SettingError(FLAG, value, "the floor is not below the ceiling", "give the smaller one first")
    return floor, ceiling


def levels(planner: Planner, floor: RetainBudget, ceiling: RetainBudget) -> tuple[RetainBudget, ...]:
    """Budgets from ceiling to floor, at most four of them in equal ratios; those that keep the same are one.

    Raises:
        BudgetError: the profile cannot reach one of the two.
    """
    ratio = tokens_of(floor, 1) / tokens_of(ceiling, 1)
    found: dict[tuple[int, ...], RetainBudget] = {}
    for i in range(_LEVELS):
        value = tokens_of(ceiling, 1) * ratio ** (i / (_LEVELS - 1))
        budget = Share(round(value, 4)) if isinstance(floor, Share) else round(value)
        found.setdefault(planner.counts(budget), budget)
    return tuple(found.values())


@dataclass
class Elastic:
    """The controller of one scheduler.

    Attributes:
        levels: budgets, the largest first.
        blocks: KV blocks of a request with one image at each level. They are also what it costs in relation to others:
            a token is cached in each layer that it meets.
        load: what images take of the engine's time.
        level: of the last request whose image was new.
        seen: levels of images by their identifiers.
        pinned_images: images of requests with budgets of their own.
    """

    levels: Sequence[RetainBudget]
    blocks: Sequence[int]
    load: ImageLoad = field(init=False)
    level: int = 0
    seen: OrderedDict[str, int] = field(default_factory=OrderedDict)
    pinned_images: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.load = ImageLoad(self.blocks[0])

    def choose(
        self,
        now: float,
        behind: float,
        free_blocks: int,
        images: Sequence[str] = (),
        least: RetainBudget | None = None,
        alone: bool = False,
        weight: float = 1.0,
    ) -> RetainBudget:
        """The budget of a request that arrives.

        Args:
            now: seconds of a monotonic clock.
            behind: weights of the requests whose prompts are not prefilled yet.
            free_blocks: of the KV cache.
            images: identifiers of its images.
            least: its own floor.
            alone: whether it found no other request, waiting or running.
            weight: its KV blocks at the ceiling, over those of a request with one image.
        """
        known = [self.seen[image] for image in images if image in self.seen]
        if not known:  # what is known is likely to be cached: it costs little, and says nothing of the load
            self.load.arrived(now, alone, weight=weight)
            self.level = self._by_load(behind)
        fits = [i for i, blocks in enumerate(self.blocks) if (behind + weight) * blocks <= free_blocks * _PROMISED]
        level = max(self.level, fits[0] if fits else len(self.levels) - 1)
        if known:
            level = min(known)
        if least is not None:
            enough = [i for i, budget in enumerate(self.levels) if tokens_of(budget, 1) >= tokens_of(least, 1)]
            level = min(level, max(enough, default=0))
        for image in images:
            self.seen[image] = level
            self.seen.move_to_end(image)
        while len(self.seen) > _REMEMBERED:
            self.seen.popitem(last=False)
        return self.levels[level]

    def pinned(self, now: float, blocks: int, images: Sequence[str], alone: bool) -> None:
        """A request that names its budget has come, of so many KV blocks; other arguments as of :meth:`choose`."""
        known = any(image in self.pinned_images for image in images)
        for image in images:
            self.pinned_images[image] = None
            self.pinned_images.move_to_end(image)
        while len(self.pinned_images) > _REMEMBERED:
            self.pinned_images.popitem(last=False)
        if not known:
            self.load.arrived(now, alone, pinned_blocks=blocks)

    def _by_load(self, behind: float) -> int:
        """The largest budget at which images take no more than their share of time; by what waits until known."""
        shares = [self.load.share(blocks, behind) for blocks in self.blocks]
        for i, share in enumerate(shares):
            if share is None:
                return min(max(int(behind) - 1, 0), len(shares) - 1)
            if share <= _SHARE * (_UP if i < self.level else 1.0):
                return i
        return len(shares) - 1


def least_of(extra_args: dict[str, Any] | None, planner: Planner) -> RetainBudget | None:
    """A request's own floor, None where it names none.

    Raises:
        BudgetError: it is no budget, of another kind than the server's, or the server's budgets do not follow the load.
    """
    if not extra_args or LEAST_FIELD not in extra_args:
        return None
    value = extra_args[LEAST_FIELD]
    least = parse_budget(value, LEAST_FIELD)
    if planner.elastic is None:
        raise BudgetError(LEAST_FIELD, value, f"this server has no --{FLAG}", "leave it out, or give eos_retain")
    if isinstance(least, Share) != isinstance(planner.elastic[0], Share):
        kind = "shares" if isinstance(planner.elastic[0], Share) else "tokens"
        raise BudgetError(LEAST_FIELD, value, f"this server's budgets are {kind}", f"give {kind}")
    return least
