"""VQA accuracy: how far a reply agrees with ten people (Antol et al., "VQA: Visual Question Answering", 1505.00468).

Replies and references are first brought into one form, by the rules that the benchmark publishes beside the metric.
"""

import re
from collections.abc import Sequence

PEOPLE = 10
# So many others with the same answer make it fully right.
_AGREEING = 3

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# "All punctuation" of the published rule; the benchmark's script leaves other signs alone, such as $, % and &.
_PUNCTUATION = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', " "))
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")

# Words that are others without the apostrophe are left out: its, were, well, shell, ill, id, wed.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'m": "i",
    "'all": "y",
    "'clock": "o",
    "'am": "ma",
    "'twas": "",
}
_TWO_ENDINGS = {
    "n't've": "could had might should would",
    "'d've": "he i it she somebody someone something there they we who you",
}


def _contractions() -> dict[str, str]:
    """Contractions that lack an apostrophe, or one of two, and how they are written."""
    found = {(stem + end).replace("'", ""): stem + end for end, stems in _ENDINGS.items() for stem in stems.split(" ")}
    for end, stems in _TWO_ENDINGS.items():
        for whole in (stem + end for stem in stems.split()):
            first, last = whole.index("'"), whole.rindex("'")
            found[whole[:first] + whole[first + 1 :]] = found[whole[:last] + whole[last + 1 :]] = whole
    return found


_CONTRACTIONS = _contractions()


def normalised(text: str) -> str:
    """A reply or reference in the form in which the two are compared.

    Lower case; no comma within a number; a blank for punctuation, but for apostrophe and colon; no period but in front
    of a digit; number words up to ten as digits; no articles; missing apostrophes of contractions; single blanks.
    """
    text = _COMMA_IN_NUMBER.sub("", text.lower()).translate(_PUNCTUATION)
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Mean over all people of min(n / 3, 1), where n of the *other* people gave this reply; from 0 to 1.

    Of ten people one gives 0.3, two give 0.6, three 0.9, four and more 1.

    Args:
        reply: the model's.
        answers: those of the people, one each.
    """
    given = normalised(reply)
    same = [normalised(answer) == given for answer in answers]
    return sum(min((sum(same) - own) / _AGREEING, 1.0) for own in same) / len(same)
