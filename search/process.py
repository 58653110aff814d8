"""What a search changes in its process while it runs: deterministic kernels, and signals that stop it in order."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any

import torch


def leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one still needs the batches of its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels, as far as there are any; what was set before comes back.

    And one thread: kernels of the CPU divide their sums by the number of threads, and so would the result depend on it.
    """
    threads = torch.get_num_threads()
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM comes; a second one of the same kind acts at once.

    A terminal's Ctrl-C reaches all processes, and whoever started this one then passes his stop on as a SIGTERM: these
    two are one. Signals need the main thread.
    """
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_together(pool: ProcessPoolExecutor) -> Iterator[None]:
    """SIGTERM ends what a pool does as Ctrl-C does, and nothing more begins; on leaving, its processes have ended.

    A terminal's Ctrl-C reaches them already, a SIGTERM does not. What runs in them is to end with
    :func:`ends_its_process`. Signals need the main thread.
    """
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        before = None
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.terminate()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def ends_its_process() -> Iterator[None]:
    """Around what a pool's process does: once it is stopped it must not take what waits in the pool's queue."""
    try:
        yield
    except KeyboardInterrupt:
        os._exit(130)
