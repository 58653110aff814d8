"""How many visual tokens each reducer leaves of an image: the documented rule, for budgets of measure final.

Each retain share is raised to the one power that meets the budget; what goes of an image is whole KV blocks.
"""

import math
from collections.abc import Mapping
from typing import Any


def cumulative_shares(profile: Mapping[str, Any]) -> list[float]:
    """Share of an image left after each reducer, by its gate and discard alone; 0 behind a withdrawal."""
    shares, share = [], 1.0
    for reducer in profile["reducers"]:
        share = 0.0 if reducer.get("withdraw") else share * (1 - reducer["gate"] * reducer["discard"])
        shares.append(share)
    return shares


def whole_blocks(total: int, keep: int, text: int, block: int) -> int:
    """The number of visual tokens next to ``keep`` that leaves whole blocks out of an image of ``total`` tokens.

    ``text`` of them are no visual tokens. Not all visual ones go unless ``keep`` is 0.
    """
    gone = math.floor((total - text - keep) / block + 0.5)
    while gone * block > total - text - (keep > 0):
        gone -= 1
    return total - text - gone * block


def expected_counts(
    profile: Mapping[str, Any], share: float, visual: int, text: int = 0, is_last: bool = False, block: int = 32
) -> list[int]:
    """Visual tokens left of an image by each reducer.

    Args:
        profile: content of an ``eos-profile`` file; ``budget.measure`` is final.
        share: the budget over the image's visual tokens.
        visual: the image's visual tokens.
        text: its places that are text.
        is_last: whether the prompt ends in one of its visual tokens, which the sampler reads.
        block: tokens of a KV block.
    """
    assert profile["budget"]["measure"] == "final"
    if share >= 1:
        return [visual] * len(profile["reducers"])
    shares = cumulative_shares(profile)
    power = math.log(share) / math.log(min(s for s in shares if s > 0))
    least = min(profile["budget"]["minimum"], visual)
    before = profile["reducers"][0]["layer"] == -1
    counts: list[int] = []
    if before:
        keep = max(least, math.floor(visual * shares[0] ** power + 0.5))
        if len(shares) > 1 and keep < visual:  # so that the reducers behind it can remove whole blocks
            keep = min(visual, max(1, math.floor(keep / block + 0.5)) * block)
        counts, shares = [keep], shares[1:]
        if profile["model"]["visual_tokens"] is None:
            visual, shares = keep, [s / cumulative_shares(profile)[0] for s in shares]
    length = counts[0] if before else visual + text
    for s in shares:
        keep = max(least, math.floor(visual * s**power + 0.5)) if s > 0 else int(is_last)
        counts.append(whole_blocks(length, min(keep, length - text), text, block))
    return counts
