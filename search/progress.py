"""What a search tells while it runs: a record of each step, a progress bar, or lines where there is no terminal."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from eos_search.loop import StepResult
from eos_search.theta import KINDS

Say = Callable[[str], None]
_LINES = 20


def record_of(step: int, result: StepResult, values: list[list[float]] | None) -> dict[str, Any]:
    """A step's record (:func:`eos_search.run_folder.read_records`); ``values``: Theta before it, by kind."""
    record: dict[str, Any] = {
        "step": step,
        "terms": result.terms,
        "acting": list(result.structure.acting),
        "counts": list(result.structure.counts),
    }
    return record if values is None else record | {"values": dict(zip(KINDS, values, strict=True))}


def show(bar: Any, step: int, steps: int, result: StepResult, say: Say) -> None:
    """Tells of a step: at the bar, or now and then as a line."""
    shown = {name: f"{result.terms[name]:.3g}" for name in ("loss", "cross_entropy", "alignment", "budget", "cost")}
    reducers = zip(result.structure.acting, result.structure.counts, strict=True)
    shown |= {
        "n_final": f"{result.terms['n_final']:.1f}",
        "kept": " ".join(f"{layer}:{count}" for layer, count in reducers) or "all",
    }
    bar.set_postfix(shown, refresh=False)
    bar.update()
    if bar.disable and (step % max(1, steps // _LINES) == 0 or step + 1 == steps):
        say(f"step {step + 1}/{steps}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))


def say_aloud(line: str) -> None:
    """A line beside the bar."""
    tqdm.write(line, file=sys.stderr)


def say_nothing(line: str) -> None:
    """No line."""


def needs_no_bar(say: Say) -> bool:
    """Whether nobody would see a bar."""
    return say is say_nothing or not sys.stderr.isatty()
