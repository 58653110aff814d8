"""Memory of a server's processes over time, and whether it is flat."""

import statistics
import threading
import time
from collections.abc import Sequence

import psutil


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process and all that descend from it; None where it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


class MemoryWatch:
    """Notes the resident memory of a process tree in a thread, for the length of a ``with`` block."""

    def __init__(self, pid: int, period: float = 5.0) -> None:
        self.pid, self.period = pid, period
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> "MemoryWatch":
        self._stop, self._start = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            if (size := resident_bytes(self.pid)) is not None:
                self.samples.append((round(time.monotonic() - self._start, 1), size))
            if self._stop.wait(self.period):
                return


def growth(sizes: Sequence[int]) -> float | None:
    """Median of the last quarter over that of the second, less one; None of fewer than eight samples.

    The first quarter is left out: caches fill up, and allocators find their size.
    """
    quarter = len(sizes) // 4
    if quarter < 2:
        return None
    return statistics.median(sizes[-quarter:]) / statistics.median(sizes[quarter : 2 * quarter]) - 1
