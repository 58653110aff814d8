"""Questions that are answered in one pass get the answers that each gets alone."""

from pathlib import Path
from typing import Any

import pytest

from eos_search.batched import answer_together
from eos_search.reference import ReferenceModel
from eos_vllm import profiles
from eos_vllm.models.images import sample_image
from support.profiles import make_profile

QUESTIONS = ("What is it?", "How many are there, and where?", "Is it red? A. yes\nB. no", "Why?")
PROFILES: dict[str, Any] = {
    "none": lambda: None,
    "three-reducers": lambda: make_profile(
        operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
    ),
    "first-layer": lambda: make_profile(layers=(0, 4), importance={"queries": "last_text"}),
    "before-the-decoder": lambda: profiles.load("embedded-vispruner"),
    "packaged": lambda: profiles.load("embedded-eos"),
}


@pytest.mark.parametrize("name", PROFILES)
def test_together_is_as_alone(name: str, tiny_model: Path) -> None:
    reference = ReferenceModel.from_pretrained(str(tiny_model), PROFILES[name]())
    image = sample_image(3)
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    for budget in (200, 40) if reference.planner else (None,):
        first, (span,), ids = reference.embed(prompts[0], [image], budget)
        before, head = first[: span.end], ids[: span.end].tolist()
        asked = [(first, ids.tolist())]
        for prompt in prompts[1:]:
            embeddings, text = reference.behind(before, prompt)
            asked.append((embeddings, head + text.tolist()))
        shared = reference.share(before)
        want = [reference.generate(prompt, [image], 6, budget).token_ids for prompt in prompts]
        assert len({tuple(answer) for answer in want}) > 1
        assert answer_together(reference, asked, span, shared, budget, 6, None) == want
        stop = want[1][2]
        ended = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in want]
        assert answer_together(reference, asked, span, shared, budget, 6, stop) == ended


def test_padding_says_nothing(tiny_model: Path) -> None:
    """A question's answer does not depend on how long the others are."""
    reference = ReferenceModel.from_pretrained(str(tiny_model), profiles.load("embedded-eos"))
    image = sample_image(1)
    first, (span,), ids = reference.embed("USER: <image>\nWhy? ASSISTANT:", [image], 64)
    long, text = reference.behind(first[: span.end], f"USER: <image>\n{'How many? ' * 40} ASSISTANT:")
    shared = reference.share(first[: span.end])
    short = (first, ids.tolist())
    longer = (long, ids[: span.end].tolist() + text.tolist())
    alone = answer_together(reference, [short], span, shared, 64, 4, None)
    assert answer_together(reference, [short, longer], span, shared, 64, 4, None)[0] == alone[0]
