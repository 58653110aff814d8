"""When a run is in its steady state: a ramp that no figure counts, then a window in which answers count.

Closed loop: the window opens when every user's first request is over, and closes with the end of a visit once it holds
enough seconds and answers. Users go on asking until then, so that the load is the same to the last moment. Open loop:
it opens after ``open_ramp`` or half its length, and lasts its length; answers that are then still due are waited for.
"""

from typing import Any

from loadtests.settings import Workload

_OPEN_RAMP = 0.5


class Window:
    """Opens and closes by what it is told; all moments are seconds on the run's clock.

    Attributes:
        opened, closed: None before it happened.
        full: False where a limit opened or closed it before it had what it wanted.
    """

    def __init__(self, workload: Workload) -> None:
        assert workload.window is not None
        self.workload, self.seconds = workload, workload.window
        self.opened: float | None = None
        self.closed: float | None = None
        self.full = True
        self._ramping = workload.concurrency
        self._answers = 0
        self._open_ramp = _OPEN_RAMP * self.seconds if workload.open_ramp is None else workload.open_ramp

    def first_over(self, now: float) -> None:
        """A user's first request is over."""
        self._ramping -= 1
        if self.opened is None and self._ramping <= 0 and self.workload.rate is None:
            self.opened = now

    def answered(self) -> None:
        """A request was answered in full."""
        self._answers += self.opened is not None

    def visit_over(self, now: float) -> None:
        """A visit has come to its end, which is when a closed loop's window may close."""
        if self.opened is None or self.closed is not None or self.workload.rate is not None:
            return
        if now - self.opened >= self.seconds and self._answers >= self.workload.window_requests:
            self.closed = now

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.closed is not None:
            return
        open_loop = self.workload.rate is not None
        if self.opened is None:
            if open_loop and now >= self._open_ramp:
                self.opened = now
            elif not open_loop and now >= self.workload.ramp_most:
                self.opened, self.full = now, False
        elif now - self.opened >= (self.seconds if open_loop else self.workload.window_most):
            self.closed, self.full = now, self.full and open_loop

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the raw results."""
        moments = {"opened": self.opened, "closed": self.closed}
        return {name: None if at is None else round(at, 4) for name, at in moments.items()} | {"full": self.full}
