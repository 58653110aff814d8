"""Where questions, images and answers come from: files, Hugging Face data sets, and the embedded benchmark.

Rows that are of no use are skipped and counted by reason; the counts are part of what is returned.
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eos_search.examples import Encoder, Row
from eos_search.images import ColumnImages, DrawnImage, FileImages
from eos_search.mixture import balanced_mix, llava_row
from eos_search.settings import SearchSettings
from eos_vllm.core.errors import SettingError

_COLUMNS = {
    "question": ("question", "prompt"),
    "answer": ("answer", "answers"),
    "image": ("image", "images", "image_files"),
}


@dataclass(frozen=True)
class Data:
    """Rows that are of use.

    Attributes:
        rows: in the order in which they were drawn.
        skipped: reasons, with how many rows were skipped for each.
        fingerprint: SHA-256 over all rows and the names of their images.
    """

    rows: tuple[Row, ...]
    skipped: Counter[str]
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for row in self.rows:
            line = json.dumps([row.id, row.question, row.answer, row.images.names, row.category])
            digest.update(line.encode() + b"\n")
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for provenance: counts and fingerprint."""
        return {"rows": len(self.rows), "skipped": dict(sorted(self.skipped.items())), "sha256": self.fingerprint}

    def summary(self) -> list[str]:
        """Lines that say what is used and what was skipped."""
        used = Counter(row.category for row in self.rows)
        lines = [f"{len(self.rows)} rows: " + ", ".join(f"{name} {used[name]}" for name in sorted(used))]
        if self.skipped:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.skipped.items()))
            lines.append(f"{self.skipped.total()} rows skipped: {reasons}")
        return lines


def load_data(settings: SearchSettings, encoder: Encoder) -> Data:
    """Draws at most ``settings.samples`` rows of use, by seed.

    Raises:
        SettingError: the data cannot be read, or none of it is of use.
    """
    skipped: Counter[str] = Counter()

    def usable(candidates: Iterable[Row]) -> Iterator[Row]:
        for row in candidates:
            if (problem := encoder.problem(row)) is None:
                yield row
            else:
                skipped[problem] += 1

    numbers = random.Random(settings.seed)
    if settings.data_format == "llava":
        entries = [llava_row(entry, _folder(settings)) for entry in _read_json(settings)]
        skipped.update(reason for reason in entries if isinstance(reason, str))
        rows = balanced_mix([row for row in entries if isinstance(row, Row)], settings.samples, numbers, usable)
    elif settings.data_format == "huggingface":
        rows = list(itertools.islice(usable(_from_dataset(settings, numbers)), settings.samples))
    else:
        drawn = settings.data_format == "cluttervqa"
        candidates = list(_drawn(settings) if drawn else _from_lines(settings, skipped))
        numbers.shuffle(candidates)
        rows = list(itertools.islice(usable(candidates), settings.samples))
    data = Data(tuple(rows), skipped)
    if not data.rows:
        shown = "; ".join(data.summary()[1:]) or "it is empty"
        raise SettingError(
            "data", settings.data or settings.data_format, f"no row is of use ({shown})", "give other data"
        )
    return data


def _drawn(settings: SearchSettings) -> Iterator[Row]:
    """Rows of the embedded benchmark: all questions of as many images as the samples need, and no file."""
    from eos_vllm.cluttervqa import samples, version_of

    version = version_of(settings.benchmark_version)
    if settings.data:
        problem, remedy = "this benchmark is drawn, not read", "leave it out, or read an export as data_format=jsonl"
        raise SettingError("data", settings.data, problem, remedy)
    images = -(-settings.samples // (len(version.kinds) - 2))
    for index, sample in enumerate(samples(settings.split, images, version=version.number)):
        image = DrawnImage(settings.split, index, version.number)
        for number, question in enumerate(sample.questions):
            yield Row(f"{sample.name}-{number:02d}", question.text, question.answer, image, question.kind)


def _from_lines(settings: SearchSettings, skipped: Counter[str]) -> Iterator[Row]:
    text = _read_text(settings)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            skipped["no JSON"] += 1
            continue
        if not isinstance(entry, dict):
            skipped["no JSON object"] += 1
            continue
        names = _value(entry, "image", settings.image_column)
        files = tuple(str(name) for name in _list(names) if name)
        yield Row(
            str(entry.get("id", number)),
            _text(_value(entry, "question", settings.question_column)),
            _text(_value(entry, "answer", settings.answer_column)),
            FileImages(_folder(settings), files),
            str(entry.get("kind", "question")),
        )


def _from_dataset(settings: SearchSettings, numbers: random.Random) -> Iterator[Row]:
    """Rows in random order; those that nobody asks for are not read."""
    import datasets

    try:
        source: Any = settings.data
        if Path(source).is_dir() and (Path(source) / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(source)
        elif Path(source).is_dir() and (Path(source) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)[settings.split]
        else:
            loaded = datasets.load_dataset(source, split=settings.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        problem = f"it cannot be loaded ({type(error).__name__}: {error})"
        raise SettingError("data", settings.data, problem, "give a data set's folder or name, and its split") from None
    question, answer, image = (_column(loaded.column_names, what, settings) for what in ("question", "answer", "image"))
    entries = loaded.select_columns([question, answer, image])
    if isinstance(loaded.features[image], datasets.Image):
        entries = entries.cast_column(image, datasets.Image(decode=False))
    for index in numbers.sample(range(len(entries)), len(entries)):
        entry = entries[index]
        images = ColumnImages(loaded, index, image, len(_list(entry[image])))
        yield Row(str(index), _text(entry[question]), _text(entry[answer]), images, "question")


def _column(names: Sequence[str], what: str, settings: SearchSettings) -> str:
    wanted = getattr(settings, f"{what}_column")
    options = (wanted,) if wanted else _COLUMNS[what]
    if (found := next((name for name in options if name in names), None)) is None:
        problem = f"the data set has no such column, but {', '.join(names)}"
        raise SettingError(f"{what}_column", wanted or " or ".join(options), problem, "name the column")
    return found


def _value(entry: dict[str, Any], what: str, column: str | None) -> Any:
    names = (column,) if column else _COLUMNS[what]
    return next((entry[name] for name in names if name in entry), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: Any) -> str:
    """Text of a field; of several accepted answers the first."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _folder(settings: SearchSettings) -> Path:
    return settings.images if settings.images is not None else Path(settings.data).parent


def _read_text(settings: SearchSettings) -> str:
    try:
        return Path(settings.data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise SettingError("data", settings.data, f"it cannot be read ({reason})", "give the path of a file") from None


def _read_json(settings: SearchSettings) -> list[Any]:
    try:
        document = json.loads(_read_text(settings))
    except ValueError as error:
        raise SettingError("data", settings.data, f"it is no JSON ({error})", "give LLaVA's JSON list") from None
    if not isinstance(document, list):
        raise SettingError("data", settings.data, "it is no JSON list", "give LLaVA's JSON list")
    return document
