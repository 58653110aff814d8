"""A tokenizer whose words are single tokens still takes any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.cluttervqa import WORDS
from eos_vllm.core.errors import EosError
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.tokenizer import build_tokenizer, word_pieces

TOKENIZER = build_tokenizer(SHAPE.vocab_size, SHAPE.image_token_id, WORDS)


@pytest.mark.parametrize("word", WORDS)
def test_each_word_is_one_token(word):
    ids = TOKENIZER.encode(word, add_special_tokens=False).ids
    assert len(ids) == 1
    assert TOKENIZER.decode(ids) == word


@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in ("<unk>", "<s>", "</s>", "<image>", "<pad>")):
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < SHAPE.vocab_size for i in ids)


def test_words_without_room_are_refused():
    with pytest.raises(EosError, match="vocab_size=261"):
        build_tokenizer(words=("red",))
    assert word_pieces((" red",)) == ["Ġr", "Ġre", "Ġred"]
