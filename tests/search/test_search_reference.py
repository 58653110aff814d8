"""The reference's short cut: questions about one image share what stands before their text."""

import pytest
import torch

from eos_search.reference import ReferenceModel
from eos_vllm.models.images import sample_image
from support.profiles import make_profile

QUESTIONS = ("What is it?", "How many are there, and where?", "Is it red? A. yes\nB. no")
PROFILES = {
    "none": None,
    "three-reducers": make_profile(operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}),
    "first-layer": make_profile(layers=(0, 4), importance={"queries": "last_text"}),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_shared_prefix_gives_what_the_whole_prompt_gives(name, tiny_model):
    reference = ReferenceModel.from_pretrained(str(tiny_model), PROFILES[name])
    image = sample_image(3)
    first, spans, _ = reference.embed(f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:", [image])
    before = first[: spans[0].start + spans[0].length]
    shared = reference.share(before)
    for budget in (None, 200, 7, 576):
        for question in QUESTIONS:
            prompt = f"USER: <image>\n{question} ASSISTANT:"
            want = reference.generate(prompt, [image], 6, budget)
            embeddings, text = reference.behind(before, prompt)
            assert len(embeddings) == len(before) + len(text)
            state = reference.prefill(embeddings, spans, budget, shared=shared)
            have = reference.answer(state, len(embeddings), 6)
            assert have.token_ids == want.token_ids
            torch.testing.assert_close(have.logprobs, want.logprobs, atol=1e-4, rtol=0)
            for a, b in zip(state.kept, want.prefill.kept, strict=True):
                assert torch.equal(a, b)


def test_given_scores_choose_in_place_of_attention(tiny_model):
    reference = ReferenceModel.from_pretrained(str(tiny_model), make_profile(layers=(1, 3)))
    embeddings, spans, _ = reference.embed("USER: <image>\nWhat? ASSISTANT:", [sample_image(1)])
    scores = torch.zeros(576)
    wanted = list(range(5, 565, 70))
    scores[wanted] = torch.arange(len(wanted), 0, -1).float()
    state = reference.prefill(embeddings, spans, 4, scores)
    visual = [int(p) - spans[0].start for p in state.kept[-1] if 0 <= int(p) - spans[0].start < 576]
    assert visual == wanted[:4]


def test_an_answer_ends_where_it_is_told_to(tiny_model):
    reference = ReferenceModel.from_pretrained(str(tiny_model), None)
    whole = reference.generate("USER: hello ASSISTANT:", max_tokens=8).token_ids
    stopped = reference.generate("USER: hello ASSISTANT:", max_tokens=8, stop=whole[3]).token_ids
    assert stopped == whole[: whole.index(whole[3]) + 1]
