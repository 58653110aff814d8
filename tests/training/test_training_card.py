"""The model card says what the raw results say."""

import pytest

from eos_search.training.card import card
from eos_vllm.core.errors import EosError

SHARE = {"value": 0.5, "low": 0.25, "high": 0.75, "questions": 8}
HELD_OUT = {
    "chance": {"presence": 0.5, "average": 0.5},
    "rows": [{"image": "a.png"}, {"image": "a.png"}],
    "cases": [
        {"profile": "none", "accuracy": {"presence": SHARE | {"value": 0.987}, "average": SHARE | {"value": 0.95}}},
        {"profile": "blind", "accuracy": {"presence": SHARE, "average": SHARE}},
    ],
}
TRAINING = {
    "provenance": {"git": "0123456789abcdef", "seed": 7, "machine": {"cores": 2, "processor": "Some Processor"}},
    "seconds": {"tower": 60.0, "full": 120.0},
    "stages": [
        {"name": "tower", "layers": 0, "steps": 5, "rate": 3e-3}
        | {"parts": [{"cells": 2, "images": 4, "questions": False}]},
        {"name": "full", "layers": 8, "steps": 9, "rate": 1e-3}
        | {"parts": [{"cells": 4, "images": 7, "questions": True}]},
    ],
}


def test_figures_are_those_of_the_results():
    text = card(TRAINING, HELD_OUT)
    assert "| presence | 8 | 98.7 (25.0 to 75.0) | 50.0 | 50.0 |" in text
    assert "3 minutes of training on 2 cores (Some Processor), at commit 0123456789ab, seed 7" in text
    assert "| tower | tower only | 5 | 4 (2, tower only) | 0.003 | 1.0 |" in text
    assert "| full | 8 | 9 | 7 (4) | 0.001 | 2.0 |" in text
    assert "2 questions about 1 images" in text


def test_a_result_without_the_blind_case_is_refused():
    with pytest.raises(EosError, match="blind"):
        card(TRAINING, HELD_OUT | {"cases": HELD_OUT["cases"][:1]})


def test_a_model_below_the_floor_gets_no_card():
    poor = {"profile": "none", "accuracy": {"presence": SHARE | {"value": 0.9}, "average": SHARE | {"value": 0.95}}}
    with pytest.raises(EosError, match=r"presence=0\.9"):
        card(TRAINING, HELD_OUT | {"cases": [poor, HELD_OUT["cases"][1]]})


def test_changes_on_top_of_the_commit_are_told():
    source = TRAINING["provenance"] | {"git": "0123456789abcdef+changes"}
    assert "at commit 0123456789ab with changes, seed 7" in card(TRAINING | {"provenance": source}, HELD_OUT)
