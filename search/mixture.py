"""The paper's balanced_mix: LLaVA-mix-665K, drawn evenly over five categories (Table 5's search data).

The paper names the categories and not their rules, which are chosen here from what a row's image path and text show.
ScienceQA is not part of the published mix: its rows are found by path where a list has them, and where a category runs
out the others take its share.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eos_search.examples import IMAGE, Row
from eos_search.images import FileImages

CATEGORIES = ("pope", "scienceqa", "gqa", "textvqa", "conversation")
OTHER = "of no category"
_SHORT = ("single word", "option's letter", "short phrase", "bounding box", "short description")


def llava_row(entry: Any, folder: Path) -> Row | str:
    """One entry of LLaVA's list as a row, or the reason why it is of no use.

    Of several turns the first counts; of an image of COCO the first that is answered by yes or no.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        return "no conversation"
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        return "no image"
    turns = list(_turns(entry["conversations"]))
    if not turns:
        return "no answer"
    question, answer = next((turn for turn in turns if "coco" in image and _is_yes_no(turn[1])), turns[0])
    category = _category(image, question, answer)
    if category is None:
        return OTHER
    return Row(str(entry.get("id", image)), question, answer, FileImages(folder, (image,)), category)


def balanced_mix(
    rows: list[Row], samples: int, numbers: random.Random, usable: Callable[[Iterable[Row]], Iterator[Row]]
) -> list[Row]:
    """Draws rows evenly over the categories, without repeats.

    Args:
        rows: candidates.
        samples: how many are wanted.
        numbers: source of randomness.
        usable: filters rows (and counts what it leaves out); only rows that are drawn are looked at.

    Returns:
        At most ``samples`` rows, shuffled.
    """
    left: dict[str, Iterator[Row]] = {}
    for category in CATEGORIES:
        members = [row for row in rows if row.category == category]
        numbers.shuffle(members)
        left[category] = usable(members)
    drawn: list[Row] = []
    while left and len(drawn) < samples:
        for category in list(left)[: samples - len(drawn)]:
            if (row := next(left[category], None)) is None:
                del left[category]
            else:
                drawn.append(row)
    numbers.shuffle(drawn)
    return drawn


def _turns(conversations: list[Any]) -> Iterator[tuple[str, str]]:
    for asked, said in zip(conversations[::2], conversations[1::2], strict=False):
        if isinstance(asked, dict) and isinstance(said, dict) and asked.get("from") == "human":
            question = str(asked.get("value", "")).replace(IMAGE, "").strip()
            if question and (answer := str(said.get("value", "")).strip()):
                yield question, answer


def _is_yes_no(answer: str) -> bool:
    return answer.strip().lower().rstrip(".") in ("yes", "no")


def _category(image: str, question: str, answer: str) -> str | None:
    path = image.lower()
    if "scienceqa" in path or "sqa/" in path:
        return "scienceqa"
    if path.startswith("gqa/"):
        return "gqa"
    if "textvqa" in path:
        return "textvqa"
    if "coco" in path and _is_yes_no(answer):
        return "pope"
    if "coco" in path and not any(sign in question.lower() for sign in _SHORT):
        return "conversation"
    return None
