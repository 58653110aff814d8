"""Accuracy per kind of question, with bootstrap intervals over images: pure functions of rows and replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eos_search.scorers import EXACT, Scorer
from eos_vllm.cluttervqa import Row, is_right

AVERAGE = "average"
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A mean score, such as the share of right answers (or a difference of two), its 95 % interval, and of how many
    questions."""

    value: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def accuracy(rows: Sequence[Row], replies: Sequence[str], seed: int = 0, scorer: Scorer = EXACT) -> dict[str, Share]:
    """Accuracy of each kind, and their unweighted mean as ``average``.

    Images are drawn with replacement, not questions: answers about one image are not independent.

    Args:
        rows: the questions.
        replies: one for each.
        seed: of the bootstrap.
        scorer: marks each reply from 0 to 1.
    """
    return _shares(rows, _marks(rows, replies, scorer), seed)


def mean_accuracy(rows: Sequence[Row], replies: Sequence[str], scorer: Scorer = EXACT) -> float:
    """The ``average`` of :func:`accuracy` without its interval, which takes longer than the mean."""
    marks = _marks(rows, replies, scorer)
    kinds = np.array([row.kind for row in rows])
    return float(np.mean([marks[kinds == kind].mean() for kind in sorted(set(kinds))]))


def loyalty(rows: Sequence[Row], replies: Sequence[str], stock: Sequence[str], seed: int = 0) -> dict[str, Share]:
    """Share of replies that are the unreduced model's, right or wrong; as :func:`accuracy`."""
    same = np.array([is_right(a, b.strip().rstrip(".")) for a, b in zip(replies, stock, strict=True)], float)
    return _shares(rows, same, seed)


def difference(
    rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str], seed: int = 0, scorer: Scorer = EXACT
) -> dict[str, Share]:
    """Accuracy of ``ours`` minus that of ``theirs`` on the same questions, paired; as :func:`accuracy`."""
    return _shares(rows, _marks(rows, ours, scorer) - _marks(rows, theirs, scorer), seed)


def relative(rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str], seed: int = 0) -> Share:
    """Average accuracy of ``ours`` over that of ``theirs`` on the same questions; its interval is paired over images.

    Both accuracies of a resample are of the same images, so that easy and hard draws cancel out.
    """
    values, drawn = [], []
    for replies in (ours, theirs):
        _, each, resampled, _ = _resampled(rows, _marks(rows, replies, EXACT), seed)
        values.append(float(each.mean()))
        drawn.append(np.nanmean(resampled, axis=1))
    low, high = np.nanpercentile(drawn[0] / drawn[1], (2.5, 97.5))
    return Share(values[0] / values[1], float(low), float(high), len(rows))


def chance(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy of guessing evenly among the answers that each question admits, per kind and on average.

    Kinds with a row that doesn't say how many answers it admits are left out, and then so is the average.
    """
    kinds = sorted({row.kind for row in rows})
    found = {}
    for kind in kinds:
        choices = [row.choices for row in rows if row.kind == kind]
        if all(choices):
            found[kind] = float(np.mean([1 / n for n in choices]))
    if len(found) == len(kinds):
        found[AVERAGE] = float(np.mean(list(found.values())))
    return found


def resampled_marks(
    rows: Sequence[Row], replies: Sequence[str], scorer: Scorer = EXACT, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean score of each kind, kinds in alphabetical order, and the same of each resample ``[RESAMPLES, kinds]``."""
    _, values, drawn, _ = _resampled(rows, _marks(rows, replies, scorer), seed)
    return values, drawn


def _marks(rows: Sequence[Row], replies: Sequence[str], scorer: Scorer) -> np.ndarray:
    """Score of each reply ``[questions]``."""
    return np.array([scorer.score(reply, row) for reply, row in zip(replies, rows, strict=True)], float)


def _resampled(
    rows: Sequence[Row], marks: np.ndarray, seed: int
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Kinds, mean mark of each, the same of each resample ``[RESAMPLES, kinds]``, and how many questions each has."""
    kinds = sorted({row.kind for row in rows})
    images = sorted({str(row.image_files) for row in rows})
    kind_of = np.array([kinds.index(row.kind) for row in rows])
    where = {image: i for i, image in enumerate(images)}
    image_of = np.array([where[str(row.image_files)] for row in rows])
    sums, counts = (np.zeros((len(images), len(kinds))) for _ in range(2))
    np.add.at(sums, (image_of, kind_of), marks)
    np.add.at(counts, (image_of, kind_of), 1)
    draws = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), RESAMPLES)
    with np.errstate(invalid="ignore"):
        drawn = (draws @ sums) / (draws @ counts)
    return kinds, sums.sum(axis=0) / counts.sum(axis=0), drawn, counts.sum(axis=0)


def _shares(rows: Sequence[Row], marks: np.ndarray, seed: int) -> dict[str, Share]:
    kinds, values, drawn, counts = _resampled(rows, marks, seed)
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    found = {
        kind: Share(float(values[k]), float(low[k]), float(high[k]), int(counts[k])) for k, kind in enumerate(kinds)
    }
    mean_low, mean_high = np.nanpercentile(np.nanmean(drawn, axis=1), (2.5, 97.5))
    found[AVERAGE] = Share(float(values.mean()), float(mean_low), float(mean_high), len(rows))
    return found
