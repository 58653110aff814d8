"""How much of an engine's time prefilling images takes, and would take at another budget: measured, not assumed.

What waits says little: a scheduler puts all prompts that have come into its next step as long as they fit, and a
server that is all but overloaded shows a queue only when it is too late. So the seconds that a KV block of an image's
prompt costs are learned from steps as they run, and arrivals are counted. Both times the blocks of a budget's plan is a
share of time.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

# Steps that the costs are medians of.
_STEPS = 16
# Arrivals are remembered for as long as so many requests at the ceiling take: long enough for a mean, short beside the
# time in which a queue builds up. Seconds until a cost is known.
_MEMORY, _FIRST_SECONDS = 8.0, 8.0


@dataclass
class ImageLoad:
    """Arrivals and costs of one engine. All moments are seconds of one monotonic clock.

    Attributes:
        ceiling: KV blocks of a request at the largest budget.
        rate: requests per second that take what budget they are given, an exponential mean; each counts as many times
            as it has the blocks of one with a single image.
        pinned: KV blocks per second of requests with budgets of their own, likewise.
        costs: seconds per KV block prefilled, of the last steps.
        decodes: seconds of steps that only decode.
    """

    ceiling: int
    rate: float = 0.0
    pinned: float = 0.0
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    decodes: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _last: float | None = None

    @property
    def cost(self) -> float | None:
        """Seconds per KV block; None until a step has prefilled an image."""
        return statistics.median(self.costs) if self.costs else None

    @property
    def memory(self) -> float:
        """Time constant of the means, seconds."""
        cost = self.cost
        return _FIRST_SECONDS if not cost else _MEMORY * cost * self.ceiling

    def arrived(self, now: float, alone: bool, pinned_blocks: int = 0, weight: float = 1.0) -> None:
        """A request with images has come.

        One that finds the engine idle is not counted. Nobody waits for it: a single client that sends its next question
        when the last is answered takes all of the time, and is no overload. Of arrivals at random, the busier an engine
        is, the fewer find it so.

        Args:
            now: the moment.
            alone: whether it found no other request.
            pinned_blocks: KV blocks of one that names its budget.
            weight: KV blocks of one that does not, at the ceiling, over those of one with a single image.
        """
        memory = self.memory
        gone = 1.0 if self._last is None else math.exp(-max(0.0, now - self._last) / memory)
        self.rate, self.pinned, self._last = self.rate * gone, self.pinned * gone, now
        if alone:
            return
        if pinned_blocks:
            self.pinned += pinned_blocks / memory
        else:
            self.rate += weight / memory

    def stepped(self, seconds: float, blocks: float, decoding: bool) -> None:
        """A step is over.

        Args:
            seconds: it took.
            blocks: KV blocks of prompts with images that it prefilled; 0: it only decoded.
            decoding: whether other requests decoded in it.
        """
        if not blocks:
            self.decodes.append(seconds)
        elif seconds > 0:
            besides = statistics.median(self.decodes) if decoding and self.decodes else 0.0
            # A step cannot have prefilled for nothing: where decoding takes nearly all of it, a tenth is a bound.
            self.costs.append(max(seconds - besides, seconds / 10) / blocks)

    def share(self, blocks: int, behind: float) -> float | None:
        """Share of the time that prefilling would take if requests had so many KV blocks; None until costs are known.

        Args:
            blocks: of a request at the budget in question.
            behind: weights of requests that are not prefilled; they are to be worked off within the memory.
        """
        cost = self.cost
        if cost is None:
            return None
        return cost * ((self.rate + behind / self.memory) * blocks + self.pinned)
