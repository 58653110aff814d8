"""How long the reducers took, without waiting for a device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Pairs of events that were not read yet; a pair is read once the device has passed it.
_PENDING = 256


class ReductionClock:
    """Seconds spent in reducers since start; on CUDA between two events of the stream, elsewhere on the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pending: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Adds what runs within the block."""
        if not self.on_cuda:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begins.record()
        yield
        ends.record()
        self._pending.append((begins, ends))
        if len(self._pending) > _PENDING:
            self._take()

    def seconds(self) -> float:
        """The sum of all blocks that the device has passed."""
        self._take()
        return self._seconds

    def _take(self) -> None:
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            self._seconds += began.elapsed_time(ended) / 1000
