"""Training batches: what a packed batch says about each question."""

import pytest
import torch

from eos_search.training.batches import MIX, QUESTIONS, Part, Steps, _names, collate, encode, prefix_ids
from eos_vllm.cluttervqa import KINDS, WORDS, make_sample
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def samples():
    return [make_sample("train", i, QUESTIONS, 3, MIX) for i in range(4)]


def test_answers_and_values_are_single_tokens(samples):
    batch = collate(samples)
    questions = [q for s in samples for q in s.questions]
    tokenizer = build_tokenizer(SHAPE.vocab_size, SHAPE.image_token_id, WORDS)
    assert [tokenizer.decode([t]).strip() for t in batch.answer.tolist()] == [q.answer for q in questions]
    assert [tokenizer.decode([t]).strip() for t in batch.value.tolist()] == [q.value for q in questions]
    assert [KINDS[k] for k in batch.kind] == [q.kind for q in questions]


def test_each_segment_is_one_question_with_its_answer(samples):
    batch = collate(samples)
    tokenizer = build_tokenizer(SHAPE.vocab_size, SHAPE.image_token_id, WORDS)
    for row, sample in enumerate(samples):
        for number, question in enumerate(sample.questions):
            mine = batch.segment[row] == number
            assert tokenizer.decode(batch.ids[row][mine].tolist()) == f"\n{question.text} ASSISTANT: {question.answer}"
            assert batch.offset[row][mine].tolist() == list(range(int(mine.sum())))


def test_answers_come_behind_the_asked_token_and_names_stand_for_their_objects(samples):
    batch = collate(samples)
    for (row, place), answer in zip(batch.asked.tolist(), batch.answer.tolist(), strict=True):
        assert batch.ids[row, place].item() == encode(":")[0]
        assert batch.ids[row, place + 1].item() == answer
    for (row, place), centre in zip(batch.named.tolist(), batch.centre.tolist(), strict=True):
        word = batch.ids[row, place].item()
        fits = [
            thing
            for thing in samples[row].scene.objects
            if word in (encode(f" {thing.kind}")[0], encode(f" {thing.colour}")[0])
        ]
        assert any([c / 96 for c in thing.centre] == pytest.approx(centre) for thing in fits)


def test_a_choice_that_asks_for_a_kind_names_the_right_option():
    drawn = [make_sample("train", i, 2, 4, ("choice",)) for i in range(12)]
    asked = {"colour": 0, "shape": 0, "digit": 0, "letter": 0}
    for sample in drawn:
        for question in sample.questions:
            ((place, _),) = _names(question, encode(f"\n{question.text} ASSISTANT:"))
            token = encode(f"\n{question.text} ASSISTANT:")[place]
            (thing,) = question.about
            assert token == encode(f" {thing.kind}")[0]
            assert (thing.kind == question.value) is (question.form != "colour")
            asked[question.form] += 1
    assert all(asked.values())


def test_a_batch_in_which_nothing_is_named_keeps_its_types():
    batch = collate([make_sample("train", i, 2, 2, ("counting",)) for i in range(2)])
    assert (tuple(batch.named.shape), batch.named.dtype) == ((0, 2), torch.long)
    assert (tuple(batch.centre.shape), batch.centre.dtype) == ((0, 2), torch.float32)


def test_steps_are_the_same_whenever_they_are_drawn():
    parts = (Part(2, 2), Part(2, 2), Part(3, 1, False))
    whole = list(Steps(1, parts, 0, 3))
    late = next(iter(Steps(1, parts, 2, 3)))
    for a, b in zip(whole[2], late, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.ids, b.ids)
    assert not torch.equal(whole[0][0].pixels, whole[0][1].pixels)
    assert not torch.equal(next(iter(Steps(2, parts, 0, 1)))[0].pixels, whole[0][0].pixels)


def test_the_prefix_is_the_chat_templates():
    tokenizer = build_tokenizer(SHAPE.vocab_size, SHAPE.image_token_id, WORDS)
    assert tokenizer.decode(list(prefix_ids()), skip_special_tokens=False) == "<s>USER: "
