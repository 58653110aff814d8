"""Scorers: how right a reply is, from 0 to 1, by a row's references. ``SCORERS`` has them by name.

Each follows the published rule of its metric, so that figures can be compared with published ones; ``docs/search.md``
has the sources. A raw result names its scorer, and so do its tables: figures of two scorers are not to be compared.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Protocol

from eos_search.vqa import PEOPLE, soft_accuracy
from eos_vllm.cluttervqa import Row, is_right
from eos_vllm.core.errors import EosError

# Similarity below which a text is another one, not the same one misread.
_ANLS_THRESHOLD = 0.5
# What may surround an option's letter.
_MARKS = ".,:;!()[]{}*#\"'"
# What follows on a letter that begins a sentence, and on no article.
_AFTER_LETTERS = ("is", "because", "or", "and")


@dataclass(frozen=True)
class Lack:
    """A field of a row without which it cannot be marked, what is wrong with it, and the remedy."""

    field: str
    problem: str
    remedy: str


class Scorer(Protocol):
    """Marks replies.

    Attributes:
        name: as ``--scorer``, raw results and tables have it.
        graded: whether a reply can be partly right.
    """

    name: str
    graded: bool

    def lacks(self, row: Row) -> Lack | None:
        """What the row lacks; None: it can be marked."""

    def score(self, reply: str, row: Row) -> float:
        """How right the reply is, from 0 to 1."""


class Exact:
    """The reply is the answer; case, blanks around it and a full stop behind it don't matter."""

    name, graded = "exact", False

    def lacks(self, row: Row) -> Lack | None:
        """``answer``."""
        if row.answer or not row.answers:
            return None
        return Lack("answer", "is missing, and scorer exact takes one alone", "give it, or choose --scorer vqa or anls")

    def score(self, reply: str, row: Row) -> float:
        """0 or 1."""
        return float(is_right(reply, row.answer))


class Vqa:
    """VQA accuracy (:func:`eos_search.vqa.soft_accuracy`)."""

    name, graded = "vqa", True

    def lacks(self, row: Row) -> Lack | None:
        """Ten ``answers``."""
        if len(row.answers) == PEOPLE:
            return None
        problem = f"are {len(row.answers)}, and scorer vqa needs {PEOPLE}"
        return Lack("answers", problem, f"give those of {PEOPLE} people, or choose --scorer anls")

    def score(self, reply: str, row: Row) -> float:
        """0, 0.3, 0.6, 0.9 or 1."""
        return soft_accuracy(reply, row.answers)


class Anls:
    """ANLS: 1 minus the normalised edit distance to the nearest reference, and 0 where that is below 0.5.

    The distance is over the length of the longer text; case and runs of blanks don't matter. Exactly 0.5 counts, as in
    the benchmarks' script; the paper's equation has it as 0.
    """

    name, graded = "anls", True

    def lacks(self, row: Row) -> Lack | None:
        """Nothing: a lone ``answer`` is a reference, too."""
        return None

    def score(self, reply: str, row: Row) -> float:
        """0, or from 0.5 to 1."""
        best = max(similarity(_one_form(reply), _one_form(reference)) for reference in row.references)
        return best if best >= _ANLS_THRESHOLD else 0.0


class Choice:
    """Multiple choice: the reply names the right option, by its letter or by its text (:func:`named_option`)."""

    name, graded = "choice", False

    def lacks(self, row: Row) -> Lack | None:
        """``options``, and an ``answer`` (or ``answers``) that is the letter or the text of one."""
        texts = {_one_form(option) for option in row.options}
        if not 2 <= len(row.options) <= len(ascii_uppercase) or len(texts - {""}) < len(row.options):
            problem = f"are {len(row.options)}, and scorer choice needs 2 to {len(ascii_uppercase)} texts that differ"
            return Lack("options", problem, "give them all, that of letter A first")
        if any(_whole(reference, row.options) is None for reference in row.references):
            field = "answers" if row.answers else "answer"
            return Lack(field, "is neither a letter nor a text of the options", "give one of them, such as A")
        return None

    def score(self, reply: str, row: Row) -> float:
        """0 or 1."""
        right = {_whole(reference, row.options) for reference in row.references}
        chosen = named_option(reply, row.options)
        return float(chosen is not None and chosen in right)


_ALL: tuple[Scorer, ...] = (Exact(), Vqa(), Anls(), Choice())
SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in _ALL}
EXACT = SCORERS["exact"]


def scorer_of(result: Mapping[str, Any]) -> Scorer:
    """The scorer of a raw result; those of before there were several have ``exact``.

    Raises:
        EosError: it names one that is not known.
    """
    name = result.get("scorer", EXACT.name)
    if name not in SCORERS:
        raise EosError("scorer", name, "is not known", f"this version has {', '.join(SCORERS)}")
    return SCORERS[name]


def check_fields(scorer: Scorer, rows: Sequence[Row], file: str) -> None:
    """Refuses rows that a scorer cannot mark.

    Raises:
        EosError: a row lacks what it needs; file, row, field and remedy are named.
    """
    for number, row in enumerate(rows, start=1):
        if lack := scorer.lacks(row):
            raise EosError(lack.field, f"{file} row {number}", lack.problem, lack.remedy)


def similarity(a: str, b: str) -> float:
    """1 minus Levenshtein's distance over the length of the longer text, from 0 to 1; 1 for two empty ones."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return 1 - row[-1] / max(len(a), len(b), 1)


def named_option(reply: str, options: Sequence[str]) -> int | None:
    """Place of the one option that a reply names, as MMBench matches before it asks a judge (2307.06281).

    The whole reply is a letter, or an option's text; else one capital letter stands in it, such as ``C.`` or ``(C)``;
    else one option's text does, as whole words. A bare A that begins a sentence is the article, a bare I the pronoun,
    where another word follows.

    Returns:
        None where it names none or several.
    """
    if (found := _whole(reply, options)) is not None:
        return found
    words, text = reply.split(), _one_form(reply)
    likely = [word for i, word in enumerate(words) if not _is_a_word(words, i)]
    named = {place for word in likely if (place := _letter(word, options)) is not None} or {
        i for i, option in enumerate(options) if re.search(rf"(?<!\w){re.escape(_one_form(option))}(?!\w)", text)
    }
    return named.pop() if len(named) == 1 else None


def _is_a_word(words: Sequence[str], i: int) -> bool:
    """Whether a capital letter among words is the article or the pronoun, and no letter of an option."""
    if i + 1 == len(words):
        return False
    begins = i == 0 or words[i - 1].endswith((".", "!", "?"))
    return words[i] == "I" or (words[i] == "A" and begins and words[i + 1] not in _AFTER_LETTERS)


def _whole(text: str, options: Sequence[str]) -> int | None:
    """Place of the option whose letter or text is the whole of a reply or reference."""
    if (found := _letter(text.upper(), options)) is not None:
        return found
    form = _one_form(text)
    return next((i for i, option in enumerate(options) if _one_form(option) in (form, form.rstrip("."))), None)


def _letter(word: str, options: Sequence[str]) -> int | None:
    """Place of the option whose capital letter a word is, marks around it aside."""
    letter = word.strip().strip(_MARKS)
    place = ascii_uppercase.find(letter) if len(letter) == 1 else -1
    return place if 0 <= place < len(options) else None


def _one_form(text: str) -> str:
    """Lower case, single blanks."""
    return " ".join(text.lower().split())
