"""The selectors of visual tokens in front of the language model, one image and one number at a time, in float64.

Written from the papers' recipes to hold :mod:`eos_vllm.core.selectors` against; nothing here calls, or is called by,
that package. A rule takes an :class:`Image` and the count ``K`` of tokens, below the number of patches ``N``, and
returns the kept patches in ascending order with the features ``[K, dv]`` that stand for them, or None where those are
the kept patches' own. Of equal values, the one of the lower index counts as the higher.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isqrt, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Chosen = tuple[list[int], Array | None]

# PruMerge's number of neighbours, and how many patches VisPruner drops in a round.
_NEIGHBOURS = 32
_DROPPED_AT_ONCE = 8
_SMALLEST_SCORE = 1e-12


@dataclass(frozen=True)
class Image:
    """What a vision tower says of one image.

    Attributes:
        vision: ``[N, dv]``, the tower's output of each patch.
        projected: ``[N, d]``, the same as the language model is given it.
        cls: ``[dv]``, the tower's output of its class token.
        cls_attention: ``[N]``, the class token's attention in the layer of ``vision``, mean over heads.
        shallow_attention: ``[N]``, the same of an early layer.
        received_attention: ``[N]``, what a patch receives from all patches.
        keys: ``[N, H, D]``, by attention head.
    """

    vision: Array
    projected: Array
    cls: Array
    cls_attention: Array
    shallow_attention: Array
    received_attention: Array
    keys: Array


def topk(image: Image, count: int, score: str = "cls_attention") -> Chosen:
    """The patches of the highest scores ``[N]`` (FasterVLM)."""
    scores = getattr(image, score)
    return _best(scores, range(len(scores)), count), None


def maxmin(image: Image, count: int, features: str = "projected") -> Chosen:
    """Each next patch is the one farthest by cosine from all chosen ones, features ``[N, d]`` (DivPrune)."""
    cosines = _cosines(getattr(image, features))
    patches = range(len(cosines))
    isolation = [min(1.0 - cosines[j][i] for i in patches if i != j) for j in patches]
    chosen = [_highest(isolation, patches)]
    distance = [1.0 - cosines[j][chosen[0]] for j in patches]
    while len(chosen) < count:
        newest = _highest(distance, _without(patches, chosen))
        chosen.append(newest)
        distance = [min(distance[j], 1.0 - cosines[j][newest]) for j in patches]
    return sorted(chosen), None


def coverage(
    image: Image, count: int, score: str = "cls_attention", features: str = "vision", alpha: float = 1.0
) -> Chosen:
    """Each next patch adds most to how well all are covered, times its score ``[N]`` to the power alpha (SCOPE)."""
    cosines = np.array(_cosines(getattr(image, features)))
    saliency = [max(float(s), _SMALLEST_SCORE) ** alpha for s in getattr(image, score)]
    patches = range(len(cosines))
    covered = np.zeros(len(cosines))
    chosen: list[int] = []
    while len(chosen) < count:
        gains = {j: float(np.maximum(0.0, cosines[j] - covered).sum()) * saliency[j] for j in _without(patches, chosen)}
        newest = _highest(gains, gains)
        chosen.append(newest)
        covered = np.maximum(covered, cosines[newest])
    return sorted(chosen), None


def mmr(
    image: Image,
    count: int,
    score: str = "received_attention",
    features: str = "projected",
    trade: float = 0.5,
) -> Chosen:
    """Each next patch weighs its score ``[N]`` against its likeness to the chosen (maximal marginal relevance)."""
    cosines = _cosines(getattr(image, features))
    scores = [float(s) for s in getattr(image, score)]
    lowest, span = min(scores), max(scores) - min(scores)
    relevance = [trade * ((s - lowest) / span if span > 0.0 else 0.0) for s in scores]
    patches = range(len(scores))
    chosen = [_highest(relevance, patches)]
    while len(chosen) < count:
        values = {
            j: relevance[j] - (1.0 - trade) * max(cosines[j][i] for i in chosen) for j in _without(patches, chosen)
        }
        chosen.append(_highest(values, values))
    return sorted(chosen), None


def visprune(
    image: Image, count: int, share: float = 0.5, features: str = "vision", score: str = "cls_attention"
) -> Chosen:
    """A share of the patches by score ``[N]``, the others by dropping duplicates in rounds (VisPruner).

    A round sets every second of the remaining patches against those between them, and drops the likest few.
    """
    cosines = _cosines(getattr(image, features))
    scores = getattr(image, score)
    important = int(count * share)
    ranked = _ranked(scores, range(len(scores)))
    kept, left = ranked[:important], ranked[important:]
    diverse = count - important
    while len(left) > diverse:
        evens, odds = left[0::2], left[1::2]
        if not odds:
            left = left[:diverse]
            break
        likeness = [max(cosines[even][odd] for odd in odds) for even in evens]
        dropped = min(_DROPPED_AT_ONCE, len(left) - diverse, len(evens))
        left = [evens[place] for place in _ranked(likeness, range(len(evens)))[dropped:]] + odds
    return sorted(kept + left), None


def window_topk(image: Image, count: int, window: int = 6) -> Chosen:
    """Half the patches evenly from square windows by shallow attention, the others by deep one (VScan's first stage).

    A picture whose side is no multiple of ``window`` is one window.
    """
    number = len(image.cls_attention)
    side = isqrt(number)
    width = window if side % window == 0 else side
    windows: dict[tuple[int, int], list[int]] = {}
    for j in range(number):
        windows.setdefault((j // side // width, j % side // width), []).append(j)
    each = count // 2 // len(windows)
    kept = [j for members in windows.values() for j in _best(image.shallow_attention, members, each)]
    others = _without(range(number), kept)
    return sorted(kept + _best(image.cls_attention, others, count - len(kept))), None


def visionzip(image: Image, count: int, contextual: float = 5 / 32) -> Chosen:
    """The class token, the patches it attends to most, and evenly spaced ones that the rest is added to (VisionZip).

    Returns:
        The ``K - 1`` patches with a token of their own, and features ``[K, dv]``: class token, dominant patches in
        ascending order, then the contextual ones in ascending order.
    """
    number = len(image.vision)
    merged = min(int(count * contextual + 0.5), count - 1)
    dominant = _best(image.cls_attention, range(number), count - merged - 1)
    rest = _without(range(number), dominant)
    targets = rest[:: max(1, len(rest) // merged)][:merged] if merged else []
    cosines = _cosines(mean_over_heads(image.keys))
    members: dict[int, list[int]] = {target: [] for target in targets}
    if targets:
        for j in _without(rest, targets):
            members[_highest(cosines[j], targets)].append(j)
    tokens = [image.cls, *(image.vision[j] for j in dominant)]
    for target in targets:
        total = np.zeros_like(image.cls)
        for j in members[target]:
            total = total + image.vision[j]
        tokens.append(image.vision[target] + total / max(1, len(members[target])))
    return sorted(dominant + targets), np.stack(tokens)


def prumerge_plus(image: Image, count: int) -> Chosen:
    """A quarter of the patches by class attention, the others evenly spaced, each with its neighbours (PruMerge+).

    Returns:
        The ``K - 1`` kept patches (1 if K is 1), and features ``[K, dv]``: by descending attention, then the evenly
        spaced ones in ascending order, then, if K is not 1, one token that sums up the patches that are not kept.
    """
    attention = [float(a) for a in image.cls_attention]
    number = len(attention)
    patches = max(1, count - 1)
    salient = _ranked(attention, range(number))[: max(1, patches // 4)]
    others = _without(range(number), salient)
    spread = patches - len(salient)
    order = salient + [others[((2 * i + 1) * len(others)) // (2 * spread)] for i in range(spread)]
    cosines = _cosines(mean_over_heads(image.keys))
    tokens = []
    for i in order:
        token = image.vision[i]
        for j in _best(cosines[i], _without(range(number), [i]), min(_NEIGHBOURS, number - 1)):
            token = token + attention[j] * image.vision[j]
        tokens.append(token)
    if count > 1:
        last = np.zeros_like(image.cls)
        for j in _without(range(number), order):
            last = last + attention[j] * image.vision[j]
        tokens.append(last)
    return sorted(order), np.stack(tokens)


def uniform(image: Image, count: int) -> Chosen:
    """The middles of ``K`` equal stretches of the patches in raster order."""
    number = len(image.vision)
    return [((2 * i + 1) * number) // (2 * count) for i in range(count)], None


PLAIN: dict[str, Callable[..., Chosen]] = {
    "topk": topk,
    "maxmin": maxmin,
    "coverage": coverage,
    "mmr": mmr,
    "visprune": visprune,
    "window_topk": window_topk,
    "visionzip": visionzip,
    "prumerge_plus": prumerge_plus,
    "uniform": uniform,
}


def attention(query: Array, key: Array) -> Array:
    """Attention ``[1 + N, 1 + N]`` of each token, class token first, to each, mean over heads of ``[1 + N, H, D]``."""
    length, heads, width = query.shape
    mean = np.zeros((length, length))
    for i in range(length):
        for head in range(heads):
            logits = key[:, head] @ query[i, head] / sqrt(width)
            shares = np.exp(logits - logits.max())
            mean[i] += shares / shares.sum() / heads
    return mean


def mean_over_heads(keys: Array) -> Array:
    """``[N, D]`` of ``[N, H, D]``."""
    return sum(keys[:, head] for head in range(keys.shape[1])) / keys.shape[1]


def _highest(values: Sequence[float] | dict[int, float] | Array, among: Iterable[int]) -> int:
    best = -1
    for j in sorted(among):
        if best < 0 or values[j] > values[best]:
            best = j
    return best


def _ranked(values: Sequence[float] | Array, among: Iterable[int]) -> list[int]:
    return sorted(among, key=lambda j: (-float(values[j]), j))


def _best(values: Sequence[float] | Array, among: Iterable[int], count: int) -> list[int]:
    return sorted(sorted(among, key=lambda j: (-float(values[j]), j))[:count])


def _without(patches: Iterable[int], gone: Iterable[int]) -> list[int]:
    left_out = set(gone)
    return [j for j in patches if j not in left_out]


def _cosines(features: Array) -> list[list[float]]:
    """Cosine of each of ``[N, d]`` to each, itself included; 0 with a vector of length 0."""
    lengths = [sqrt(float(np.dot(row, row))) for row in features]
    cosines = [[0.0] * len(features) for _ in features]
    for i, row in enumerate(features):
        for j in range(i, len(features)):
            if lengths[i] > 0.0 and lengths[j] > 0.0:
                cosines[i][j] = cosines[j][i] = float(np.dot(row, features[j])) / (lengths[i] * lengths[j])
    return cosines
