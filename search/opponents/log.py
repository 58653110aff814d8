"""The log of an opponent's trials, a line for each rung: what a search that was killed goes on from.

The opponent proposes again from its seed; what the log holds is not asked again. So the state of no sampler is saved.
"""

import json
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError

TRIALS = "trials.jsonl"


class TrialLog:
    """``trials.jsonl`` of a folder."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there, and drops a last line that a kill cut short."""
        self.file = folder / TRIALS
        self._records: dict[tuple[int, int], dict[str, Any]] = {}
        lines = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                break
            lines.append(line + "\n")
            self._records[record["trial"], record["rung"]] = record
        if lines:
            part = self.file.with_name(TRIALS + ".part")
            part.write_text("".join(lines), encoding="utf-8")
            part.replace(self.file)
        elif self.file.exists():
            self.file.unlink()

    @property
    def cpu_seconds(self) -> float:
        """CPU-seconds of the sittings that the log is of."""
        return max((record["cpu_seconds"] for record in self._records.values()), default=0.0)

    def earlier(self, trial: int, rung: int, profile: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a trial on a rung; None where there is none yet.

        Raises:
            SettingError: it is of another profile than ``profile`` (:func:`eos_search.raw.behaviour`).
        """
        record = self._records.get((trial, rung))
        if record is not None and record["profile"] != json.loads(json.dumps(profile)):
            problem = f"trial {trial} was another profile: code or a package has changed since"
            raise SettingError("out", str(self.file), problem, "start anew in another folder")
        return record

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds a record, and returns it."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._records[record["trial"], record["rung"]] = record
        return record
