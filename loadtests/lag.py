"""How late locust's own loop was: a busy client stamps tokens later than they came, and the report says by how much."""

from time import perf_counter

import gevent

_PERIOD = 0.05


class LagWatch:
    """Sleeps for 50 ms again and again, and notes by how much each nap was too long."""

    def __init__(self) -> None:
        self.lags: list[float] = []

    def watch(self) -> None:
        """Runs until its greenlet is killed."""
        while True:
            before = perf_counter()
            gevent.sleep(_PERIOD)
            self.lags.append(perf_counter() - before - _PERIOD)

    def summary(self) -> dict[str, float | int]:
        """Seconds: median, 99th percentile and the worst of all naps."""
        lags = sorted(self.lags) or [0.0]
        return {
            "naps": len(self.lags),
            "median": round(lags[len(lags) // 2], 5),
            "p99": round(lags[min(len(lags) - 1, int(0.99 * len(lags)))], 5),
            "worst": round(lags[-1], 5),
        }
