"""CPU-seconds of a search: counted over all its sittings, kept in ``run.json``, and read by its opponents."""

import json
import os
from pathlib import Path
from typing import Any

from eos_search.run_folder import RESTARTS, RUN, THETA
from eos_vllm.core.errors import SettingError

_KEY = "cpu_seconds"


class SpentTime:
    """CPU-seconds from now on, of this process and those of its children that have ended, on top of earlier ones."""

    def __init__(self, earlier: float | None = 0.0) -> None:
        """``earlier``: those of the sittings before; None where they are not known, and then none ever are."""
        self._earlier, self._start = earlier, _clock()

    def seconds(self, accelerator: Any = None) -> float | None:
        """So far; with an accelerator of several processes the sum over them, which all have to ask for."""
        own = _clock() - self._start
        if accelerator is not None and accelerator.num_processes > 1:
            import torch

            own = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").item()
        return None if self._earlier is None else round(self._earlier + own, 3)


def earlier_seconds(folder: Path) -> float | None:
    """What ``run.json`` of a folder says; None where it says nothing (searches before they were counted)."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8")).get(_KEY)
    except (OSError, ValueError, AttributeError):
        return None


def seconds_of(folder: Path) -> float:
    """CPU-seconds of a search that has ended, from several placements or one.

    Raises:
        SettingError: there is none, it has not ended, it ran on a GPU, or its seconds were not counted.
    """
    remedy = "name the folder of a search that has ended, or give --seconds"
    if not (folder / THETA).exists():
        raise SettingError("like", str(folder), "it holds no search that has ended", remedy)
    if (folder / RESTARTS).exists():
        searches = json.loads((folder / RESTARTS).read_text(encoding="utf-8"))["searches"]
        return sum(_seconds_of_one(folder / search["folder"], remedy) for search in searches)
    return _seconds_of_one(folder, remedy)


def _seconds_of_one(folder: Path, remedy: str) -> float:
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        device = run["device"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingError("like", str(folder), f"its {RUN} cannot be read", remedy) from None
    if device != "cpu":
        raise SettingError("like", str(folder), f"it ran on {device}: CPU-seconds do not tell its cost", remedy)
    if not run.get(_KEY):
        raise SettingError("like", str(folder), "its CPU-seconds were not counted", remedy)
    return float(run[_KEY])


def _clock() -> float:
    return sum(os.times()[:4])
