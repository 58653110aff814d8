"""Whether a benchmark discriminates: wrong tokens must cost, and the right ones must not.

It does when, at 64 tokens before the decoder, every n-th patch (``uniform``) loses 25 points or more against all
tokens, and the patches that the question needs (``oracle``) lose 5 or fewer; on the mean over the kinds of question
without counting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eos_search.ablations.tables import result_rows
from eos_search.accuracy import AVERAGE, Share, accuracy, difference
from eos_search.answerers import STOCK, Case
from eos_search.scorers import scorer_of
from eos_search.selectors import named_selector
from eos_vllm.cluttervqa import Row
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import SCHEMA, Profile, parse_profile

BUDGET = 64
UNIFORM, ORACLE = "uniform", "oracle"
LEAST_LOSS, MOST_LOSS = 0.25, 0.05
APART = "counting"
WITHOUT = f"average without {APART}"


def selecting_profile(layers: int, visual_tokens: int, keep: int, name: str = UNIFORM) -> Profile:
    """What a selector (:data:`eos_search.selectors.NAMED`) chooses before the decoder of a model of so many layers.

    Nothing acts behind it, and what is not chosen is dropped.

    Raises:
        SettingError: no selector has the name.
    """
    selector = named_selector(name)
    assert selector is not None
    reducer = {"gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}
    reducer |= {"gate": 1.0, "discard": 1 - keep / visual_tokens}
    data = {
        "schema": SCHEMA,
        "name": name,
        "description": "",
        "model": {
            "architecture": "LlavaForConditionalGeneration",
            "num_decoder_layers": layers,
            "visual_tokens": visual_tokens,
        },
        "importance": {"queries": "image", "heads": "mean"},
        "operator": {"gate_sharpness": 10.0, "norm": "token"},
        "reducers": [{"layer": -1, "select": selector.model_dump()} | reducer],
        "budget": {"measure": "final", "tokens": keep, "minimum": 1},
        "provenance": {},
    }
    return parse_profile(data, name)


def yardsticks(layers: int, visual_tokens: int, keep: int = BUDGET) -> list[Case]:
    """The three cases that tell: all tokens, ``uniform``, and ``oracle`` in its place.

    Raises:
        EosError: the model has no more tokens than are to be kept.
    """
    if not 1 <= keep < visual_tokens:
        problem = f"is not from 1 to {visual_tokens - 1}, for an image has {visual_tokens} tokens"
        raise EosError("--budget", keep, problem, "give fewer than the model has")
    profile = selecting_profile(layers, visual_tokens, keep)
    return [
        Case(STOCK, None, None),
        Case(UNIFORM, profile, keep),
        Case(ORACLE, profile, keep, selection=ORACLE),
    ]


def without(rows: Sequence[Row], replies: Sequence[str], kind: str = APART) -> tuple[list[Row], list[str]]:
    """Rows of all other kinds, and the replies to them."""
    kept = [(row, reply) for row, reply in zip(rows, replies, strict=True) if row.kind != kind]
    return [row for row, _ in kept], [reply for _, reply in kept]


def with_both_means(result: Mapping[str, Any]) -> dict[str, Any]:
    """A raw result whose cases tell the mean over kinds without counting as well, before the mean over all."""
    rows = result_rows(result)
    if not {row.kind for row in rows} - {APART} or APART not in {row.kind for row in rows}:
        return dict(result)
    cases = []
    for case in result["cases"]:
        found = {kind: share for kind, share in case["accuracy"].items() if kind != AVERAGE}
        found[WITHOUT] = asdict(accuracy(*without(rows, case["replies"]), scorer=scorer_of(result))[AVERAGE])
        cases.append({**case, "accuracy": found | {AVERAGE: case["accuracy"][AVERAGE]}})
    return {**result, "cases": cases}


@dataclass(frozen=True)
class Verdict:
    """What ``uniform`` and ``oracle`` lose against all tokens, as shares with intervals, paired by question."""

    uniform: Share
    oracle: Share

    @property
    def discriminates(self) -> bool:
        """Whether both are on the right side of their bound."""
        return self.uniform.value >= LEAST_LOSS and self.oracle.value <= MOST_LOSS

    def __str__(self) -> str:
        lines = [
            f"{UNIFORM} loses {self.uniform} points; {100 * LEAST_LOSS:.0f} or more are wanted",
            f"{ORACLE} loses {self.oracle} points; {100 * MOST_LOSS:.0f} or fewer are wanted",
            "it discriminates" if self.discriminates else "it does not discriminate",
        ]
        return "\n".join(lines)


def verdict(result: Mapping[str, Any]) -> Verdict:
    """Judges a raw result that holds the :func:`yardsticks`.

    Raises:
        EosError: one of them is missing.
    """
    replies = {case["profile"]: case["replies"] for case in result["cases"]}
    if missing := {STOCK, UNIFORM, ORACLE} - set(replies):
        raise EosError("result", ", ".join(sorted(missing)), "is missing", "run eos-search discriminates --out")
    rows = result_rows(result)
    kept, everything = without(rows, replies[STOCK])
    found = [
        difference(kept, everything, without(rows, replies[name])[1], scorer=scorer_of(result))[AVERAGE]
        for name in (UNIFORM, ORACLE)
    ]
    return Verdict(*found)
