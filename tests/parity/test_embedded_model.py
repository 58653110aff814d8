"""The embedded model: transformers and vLLM agree on it, with the searched profile, too; it answers rightly (3, 4)."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_search.chats import chat_prompt
from eos_search.reference import ReferenceModel
from eos_vllm import profiles
from eos_vllm.cluttervqa import KINDS, is_right, samples
from eos_vllm.models import embedded
from eos_vllm.models.tiny import tensor_shapes
from eos_vllm.models.tokenizer import EOS_ID
from support.engines import Ask, answer_all, engine

PROFILE = "embedded-searched"
REDUCED = 32
TOKENS = 3


@pytest.fixture(scope="module")
def questions() -> list[tuple[Any, Any]]:
    """240 held-out questions with their images, all kinds alike as far as the scenes admit them."""
    found = [(sample, question) for sample in samples("validation", 48) for question in sample.questions]
    assert {question.kind for _, question in found} == set(KINDS)
    assert len(found) >= 240
    return found[:240]


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.from_pretrained(str(embedded.path()), profiles.load(PROFILE), block=32)


@pytest.fixture(scope="module")
def served(questions: Any, reference: ReferenceModel) -> dict[int, list[list[int]]]:
    """vLLM's greedy tokens at each budget."""
    prompts = [chat_prompt(reference.processor, question.text, 1) for _, question in questions]
    with engine(embedded.path(), profiles.load(PROFILE)) as llm:
        return {
            budget: [
                answer.token_ids
                for answer in answer_all(
                    llm, [Ask(p, [s.image], budget, TOKENS) for p, (s, _) in zip(prompts, questions, strict=True)]
                )
            ]
            for budget in (576, REDUCED)
        }


def up_to_end(tokens: list[int]) -> list[int]:
    """The answer's tokens, without what stands behind the end token."""
    return tokens[: tokens.index(EOS_ID)] if EOS_ID in tokens else tokens


def share_right(questions: Any, reference: ReferenceModel, answers: list[list[int]]) -> float:
    decode = reference.processor.tokenizer.decode
    marks = [is_right(decode(up_to_end(a)), q.answer) for a, (_, q) in zip(answers, questions, strict=True)]
    return sum(marks) / len(marks)


def test_vllm_and_transformers_agree_on_every_answer(questions: Any, served: Any) -> None:
    """Plain transformers, not the reference: ``generate`` as users call it."""
    model = AutoModelForImageTextToText.from_pretrained(embedded.path(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(embedded.path())
    for (sample, question), tokens in zip(questions[:200], served[576][:200], strict=True):
        prompt = chat_prompt(processor, question.text, 1)
        inputs = processor(text=prompt, images=[sample.image], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert up_to_end(generated.tolist()) == up_to_end(tokens), question.text


def test_vllm_and_the_reference_agree_on_every_reduced_answer(
    questions: Any, served: Any, reference: ReferenceModel
) -> None:
    for (sample, question), tokens in zip(questions[:200], served[REDUCED][:200], strict=True):
        prompt = chat_prompt(reference.processor, question.text, 1)
        want = reference.generate(prompt, [sample.image], TOKENS, REDUCED).token_ids
        assert want == tokens, question.text


def test_it_sees(questions: Any, served: Any, reference: ReferenceModel) -> None:
    assert share_right(questions, reference, served[576]) >= 0.95


def test_answers_are_not_settled_before_the_first_reducer(questions: Any, reference: ReferenceModel) -> None:
    """With one token left behind layer 2 hardly more than guessing remains."""
    one = ReferenceModel(reference.model, reference.processor, profiles.load("embedded-fastv"), retain=1)
    answers = [
        one.generate(chat_prompt(one.processor, q.text, 1), [s.image], TOKENS, stop=EOS_ID).token_ids
        for s, q in questions[:150]
    ]
    assert share_right(questions[:150], reference, answers) < 0.42


def test_files_are_complete_small_and_published_by_name() -> None:
    from safetensors import safe_open

    files = {file.name for file in embedded.path().iterdir()}
    assert files >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert sum(file.stat().st_size for file in embedded.path().iterdir()) <= 12 << 20
    with safe_open(embedded.path() / "model.safetensors", "pt") as weights:
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        kinds = {weights.get_slice(name).get_dtype() for name in found}
    assert found == tensor_shapes(embedded.SHAPE)
    assert kinds == {"F16"}
    config = json.loads((embedded.path() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert 8 <= config["text_config"]["num_hidden_layers"] <= 12
    assert config["text_config"]["head_dim"] in (32, 64)
