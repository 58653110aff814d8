"""Rows of questions as JSONL: those of an export, and those of any other benchmark in the same form."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError

REMEDY = "write one with: eos-vllm cluttervqa DIRECTORY"
_BOX = "left, top, right, bottom with right above left and bottom above top"


@dataclass(frozen=True)
class Row:
    """One line of a JSONL; boxes are left, top, right, bottom in pixels.

    Attributes:
        id: its name; the line's number where the file gives none.
        kind: kind of question, over which accuracies are told apart.
        prompt: the question.
        answer: the right answer; empty where only ``answers`` are given.
        image_files: absolute paths.
        boxes: those of all objects.
        form: wording of the question.
        choices: how many answers the question admits; 0: not known.
        needs: boxes of the objects that the answer rests on; None: not known.
        answers: several references, such as those of ten people.
        options: of a multiple-choice question, that of letter A first.
        history: the turns of its chat before it, each a question and its reference answer.
    """

    id: str
    kind: str
    prompt: str
    answer: str
    image_files: tuple[Path, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    form: str = ""
    choices: int = 0
    needs: tuple[tuple[float, float, float, float], ...] | None = None
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers, one or more."""
        return self.answers or (self.answer,)


def read_rows(file: str | Path) -> list[Row]:
    """Rows of an exported JSONL, or of any JSONL of prompt, answer and image_files; image paths become absolute.

    ``answers`` may stand in place of ``answer``. Rows of the same ``chat`` are its turns in the file's order; their
    kind is ``turn 1``, ``turn 2`` and so on where they name none.

    Raises:
        EosError: the file cannot be read, or a line is no UTF-8, lacks a field or holds one of a wrong type, or has
            other images than its chat; the line is named.
    """
    path = Path(file)
    try:
        # JSON strings may hold other line separators, such as U+2028.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise EosError("rows", str(path), f"cannot be read ({error.strerror})", REMEDY) from error
    rows: list[Row] = []
    chats: dict[str, list[Row]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line.decode("utf-8"))
            row = _row(path.parent, number, data)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
            problem = f"line {number} is no row ({type(error).__name__}: {error})"
            raise EosError("rows", str(path), problem, "give prompt, answer and image_files in every line") from error
        if (chat := data.get("chat")) is not None:
            turns = chats.setdefault(str(chat), [])
            if turns and turns[0].image_files != row.image_files:
                problem = f"line {number} has other images than the first turn of chat {chat}"
                raise EosError("rows", str(path), problem, "give all turns of a chat the same image_files")
            turns.append(row)
            kind = row.kind if "kind" in data else f"turn {len(turns)}"
            row = replace(row, kind=kind, history=tuple((turn.prompt, _usual(turn)) for turn in turns[:-1]))
        rows.append(row)
    return rows


def _usual(row: Row) -> str:
    """The answer that a chat goes on from: the row's own, or the one that most people gave."""
    return row.answer or Counter(row.references).most_common(1)[0][0]


def _row(folder: Path, number: int, data: Any) -> Row:
    """The row of one line; KeyError, TypeError or another of ``read_rows``' errors where it is none."""
    if not isinstance(data["prompt"], str):
        raise TypeError("prompt is no string")
    answers = _strings("answers", data.get("answers") or [])
    options = _strings("options", data.get("options") or [])
    answer = data.get("answer", "") if answers else data["answer"]
    if not isinstance(answer, str):
        raise TypeError("answer is no string")
    files, boxes = _strings("image_files", data["image_files"]), data.get("boxes", [])
    needs = data.get("needs")
    for name, value in (("boxes", boxes), ("needs", [] if needs is None else needs)):
        if not isinstance(value, list) or not all(map(_is_box, value)):
            raise TypeError(f"{name} is no list of {_BOX}")
    return Row(
        id=str(data.get("id", number)),
        kind=str(data.get("kind", "question")),
        prompt=data["prompt"],
        answer=answer,
        image_files=tuple((folder / name).resolve() for name in files),
        boxes=tuple((left, top, right, bottom) for left, top, right, bottom in boxes),
        form=str(data.get("form", "")),
        choices=int(data.get("choices", len(options))),
        needs=None if needs is None else tuple((left, top, right, bottom) for left, top, right, bottom in needs),
        answers=answers,
        options=options,
    )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name} is no list of strings")
    return tuple(value)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return False
    left, top, right, bottom = box
    return -math.inf < left < right < math.inf and -math.inf < top < bottom < math.inf
