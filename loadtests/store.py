"""Raw results in a folder: one JSON file for the sweep, one for each of its cells; nothing is ever half written."""

import json
import os
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError

SWEEP = "sweep.json"
CELLS = "cells"


class Store:
    """The folder of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes what the sweep depends on, or finds it written by a run that was cut short.

        Args:
            settings: what the cells' figures depend on.
            facts: the rest that belongs on the page (provenance, say); those of each start are kept.

        Raises:
            SettingError: the folder holds results of other settings.
        """
        file = self.folder / SWEEP
        sessions = []
        if file.is_file():
            found = self.sweep()
            if different := [key for key in sorted({*settings, *found["settings"]}) if not _same(settings, found, key)]:
                raise SettingError(
                    "out",
                    str(self.folder.name),
                    f"it holds a sweep with other settings ({', '.join(different)})",
                    "name another folder, or repeat that sweep's settings to resume it",
                )
            sessions = found["sessions"]
        _write(file, {"settings": settings, "sessions": [*sessions, facts]})

    def sweep(self) -> dict[str, Any]:
        """What :meth:`begin` wrote.

        Raises:
            SettingError: there is no readable sweep.
        """
        return _read(self.folder / SWEEP)

    def note(self, **facts: Any) -> None:
        """Adds facts to the session that runs."""
        data = self.sweep()
        data["sessions"][-1] |= facts
        _write(self.folder / SWEEP, data)

    def has(self, key: str) -> bool:
        """Whether the cell is measured."""
        return self._file(key).is_file()

    def save(self, key: str, cell: dict[str, Any]) -> None:
        """Keeps a measured cell, its key in front of all else."""
        _write(self._file(key), {"key": key, **cell})

    def cells(self) -> list[dict[str, Any]]:
        """All measured cells, by key.

        Raises:
            SettingError: one cannot be read.
        """
        return [_read(file) for file in sorted((self.folder / CELLS).glob("*.json"))]

    def _file(self, key: str) -> Path:
        return self.folder / CELLS / f"{key.replace('/', '-')}.json"


def _same(settings: dict[str, Any], found: dict[str, Any], key: str) -> bool:
    # By way of JSON, which knows no tuples.
    return json.dumps(settings.get(key), sort_keys=True) == json.dumps(found["settings"].get(key), sort_keys=True)


def _write(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(dumps(data) + "\n", encoding="utf-8")
    os.replace(part, file)


def dumps(data: Any) -> str:
    """JSON that people can read and git can compare: an object a level deep, and each of its list's entries, a line."""
    if isinstance(data, dict):
        parts = [f"{json.dumps(key)}: {_entries(value)}" for key, value in data.items()]
        return "{\n" + ",\n".join(parts) + "\n}"
    return json.dumps(data)


def _entries(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        remedy = "name a folder that loadtests.sweep wrote"
        raise SettingError("results", file.name, f"it cannot be read ({e.strerror})", remedy) from None
    except json.JSONDecodeError as e:
        raise SettingError("results", file.name, f"it is no JSON ({e})", "delete it and resume the sweep") from None
