"""Questions and images: the rows of a JSONL file, or the embedded benchmark exported into a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_vllm import cluttervqa
from eos_vllm.core.errors import SettingError

_REMEDY = 'a row is {"prompt": "…", "image_files": ["…"], "answer": "…"}; answer and images may be absent'


@dataclass(frozen=True)
class Row:
    """One question; ``answer`` is None where it isn't known. Paths are absolute."""

    prompt: str
    image_files: tuple[Path, ...] = ()
    answer: str | None = None
    kind: str = ""


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a JSONL file, image paths relative to its folder; fields that aren't needed are let be.

    Raises:
        SettingError: no such file, no rows, a line that is no row, or an image that isn't there.
    """
    try:
        # JSON strings may hold other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise SettingError("rows", str(path), f"it cannot be read ({e})", "name a JSONL file in UTF-8") from None
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise SettingError("rows", str(path), "it holds no row", _REMEDY)
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    where = f"{path.name} line {number}"
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as e:
        raise SettingError("rows", where, f"it is no JSON ({e.msg})", _REMEDY) from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise SettingError("rows", where, "it has no prompt", _REMEDY)
    files = values.get("image_files", [])
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise SettingError("rows", where, "image_files is no list of paths", _REMEDY)
    images = tuple((path.parent / name).resolve() for name in files)
    for image in images:
        if not image.is_file():
            raise SettingError("rows", where, f"no such image: {image.name}", "paths are relative to the JSONL file")
    answer = values.get("answer")
    return Row(values["prompt"], images, None if answer is None else str(answer), str(values.get("kind", "")))


def export_benchmark(folder: Path, images: int, questions_per_image: int = 6) -> Path:
    """Writes the embedded benchmark's test split into a new folder and returns its JSONL."""
    return cluttervqa.export(folder, "test", images, questions_per_image)


def is_right(reply: str, answer: str | None) -> bool | None:
    """Whether a reply counts as right by the embedded benchmark's rule; None where the answer isn't known."""
    return None if answer is None else cluttervqa.is_right(reply, answer)
