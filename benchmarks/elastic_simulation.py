"""Elastic budgets from idle into overload, in a simulation: the server's own controller before a made-up engine.

    python -m benchmarks.elastic_simulation --out results/elastic-simulation.json

Where fixed 64 is saturated itself, a queue of one second more or less decides over half a minute's goodput: no handful
of windows of the real sweep (`results/elastic-cpu`) can tell 3 % there. Here hundreds of windows can, with the sweep's
arrivals, deadlines and ramp from idle. Seconds of a step are those of the sweep's machine, roughly; `--slower` makes
prefills that much slower, so that 64 is saturated earlier. What is simulated is the arithmetic of a queue, no engine:
it says how much a controller that starts at its ceiling loses, not how fast anything is.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from benchmarks import common
from eos_vllm.serving import elastic_load
from eos_vllm.serving.elastic import Elastic
from loadtests.origin import origin

LEVELS = (192, 133, 92, 64)
BLOCKS = (60, 52, 45, 40)
# Seconds that prefilling an image takes, a step beside it, and a request that decodes in it; prompts a step holds.
PREFILL = {192: 0.51, 133: 0.44, 92: 0.38, 64: 0.34}
STEP, DECODE, TOGETHER = 0.032, 0.004, 3
OUTPUT, CAPACITY = 16, 0.70
TTFT, LAST = 3.37, 5.68
RAMP, END = 10.05, 45.08
MULTIPLES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
FIXED = (192, 64)


class QuickRise(Elastic):
    """Also lowers the budget by how many requests are there: each came within about the last second."""

    there, seconds, most = 0, 1.0, 1.0

    def _by_load(self, behind: float) -> int:
        level, cost = super()._by_load(behind), self.load.cost
        assert cost is not None
        share = [self.there * cost * blocks / self.seconds for blocks in self.blocks]
        quick = next((i for i, taken in enumerate(share) if taken <= self.most), len(share) - 1)
        return max(level, quick)


# Name: controller, and how many requests at the ceiling its means last (None: as shipped).
CONTROLLERS: dict[str, tuple[Callable[[], Elastic], float | None]] = {
    "as shipped": (lambda: Elastic(LEVELS, BLOCKS), None),
    "half the memory": (lambda: Elastic(LEVELS, BLOCKS), 4.0),
    "a quarter of it": (lambda: Elastic(LEVELS, BLOCKS), 2.0),
    "quick rise by requests there": (lambda: QuickRise(LEVELS, BLOCKS), None),
}


@dataclass
class Request:
    """One of a simulated window, with what it got."""

    due: float
    budget: int
    first: float = math.inf
    last: float = math.inf
    tokens: int = field(default=1)

    @property
    def good(self) -> bool:
        return self.first - self.due <= TTFT and self.last - self.due <= LAST


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--windows", type=int, default=300, help="of each case (default: %(default)s)")
    parser.add_argument("--slower", type=float, default=1.0, help="factor on prefills (default: %(default)s)")
    return common.run(parser, measure, table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Good requests per second of each window, by case and multiple; mean budget of the controllers."""
    good: dict[str, dict[str, list[float]]] = {}
    budgets: dict[str, dict[str, float]] = {}
    for multiple in MULTIPLES:
        for name, (make, memory) in CONTROLLERS.items():
            with mock.patch.object(elastic_load, "_MEMORY", memory or elastic_load._MEMORY):
                found = [window(multiple * CAPACITY, seed, args.slower, make()) for seed in range(args.windows)]
            good.setdefault(name, {})[str(multiple)] = [rate(requests) for requests in found]
            given = [request.budget for requests in found for request in requests]
            budgets.setdefault(name, {})[str(multiple)] = round(statistics.mean(given), 1)
        for budget in FIXED:
            found = [window(multiple * CAPACITY, seed, args.slower, budget) for seed in range(args.windows)]
            good.setdefault(str(budget), {})[str(multiple)] = [rate(requests) for requests in found]
    return {
        "provenance": origin(seed=0),
        "settings": {"slower": args.slower, "capacity": CAPACITY, "windows": args.windows, "simulated": True},
        "good": good,
        "budgets": budgets,
    }


def window(arrivals: float, seed: int, slower: float, server: Elastic | int) -> list[Request]:
    """Requests from idle on, until the last one is answered; ``arrivals`` per second."""
    chance = random.Random(seed)
    moments = []
    now = chance.expovariate(arrivals)
    while now < END + 2:
        moments.append(now)
        now += chance.expovariate(arrivals)
    if isinstance(server, Elastic):  # it has served before: costs are known, nothing is on its way
        for _ in range(6):
            server.load.stepped(PREFILL[LEVELS[0]] * slower, BLOCKS[0], False)
            server.load.stepped(STEP, 0, True)
    waiting: list[Request] = []
    running: list[Request] = []
    done: list[Request] = []
    now, coming = 0.0, list(reversed(moments))
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[-1])
        while coming and coming[-1] <= now:
            due = coming.pop()
            waiting.append(Request(due, budget_of(server, due, len(waiting), len(running))))
        prefilled, waiting = waiting[:TOGETHER], waiting[TOGETHER:]
        seconds = STEP + DECODE * len(running)
        seconds += slower * sum(PREFILL[request.budget] for request in prefilled) * chance.uniform(0.95, 1.05)
        now += seconds
        if isinstance(server, Elastic):
            blocks = sum(BLOCKS[LEVELS.index(request.budget)] for request in prefilled)
            server.load.stepped(seconds, blocks, bool(running))
        for request in running:
            request.tokens += 1
            request.last = now
        for request in prefilled:
            request.first = now
        done += [request for request in running if request.tokens == OUTPUT]
        running = [request for request in running if request.tokens < OUTPUT] + prefilled
    return done


def budget_of(server: Elastic | int, due: float, waiting: int, running: int) -> int:
    """What a request is given that comes now."""
    if not isinstance(server, Elastic):
        return server
    if isinstance(server, QuickRise):
        server.there = waiting + running
    alone = not waiting and not running
    chosen = server.choose(due, float(waiting), 10**6, (str(due),), alone=alone)
    assert isinstance(chosen, int)
    return chosen


def rate(requests: list[Request]) -> float:
    """Good requests per second of the window."""
    return sum(request.good for request in requests if RAMP <= request.due <= END) / (END - RAMP)


def table(result: dict[str, Any]) -> str:
    """Goodput of the fixed budgets, that of each controller over the better one, and its mean budget."""
    names = list(CONTROLLERS)
    lines = ["| arrivals over stock's capacity | 192 | 64 | " + " | ".join(names) + " |"]
    lines.append("| --- " * (3 + len(names)) + "|")
    for multiple in map(str, MULTIPLES):
        fixed = {budget: result["good"][str(budget)][multiple] for budget in FIXED}
        better = max(fixed.values(), key=statistics.mean)
        cells = [multiple, *(f"{statistics.mean(values):.2f}" for values in fixed.values())]
        for name in names:
            low, high = interval(result["good"][name][multiple], better)
            ours = statistics.mean(result["good"][name][multiple]) / statistics.mean(better)
            cells.append(f"{ours:.3f} ({low:.3f} to {high:.3f}), mean budget {result['budgets'][name][multiple]:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(ours: list[float], theirs: list[float], draws: int = 1000) -> tuple[float, float]:
    """Of the ratio of means, paired by window."""
    chance, ratios = random.Random(0), []
    for _ in range(draws):
        drawn = chance.choices(range(len(ours)), k=len(ours))
        ratios.append(sum(ours[i] for i in drawn) / sum(theirs[i] for i in drawn))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


if __name__ == "__main__":
    raise SystemExit(main())
