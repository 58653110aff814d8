"""What a search changes in its process while it runs: deterministic kernels, and signals that stop it in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
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
    """A list that fills when Ctrl-C or SIGTERM comes; a second one acts at once. Signals need the main thread."""
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
