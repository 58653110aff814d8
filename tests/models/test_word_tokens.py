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


def test_fillers_never_take_the_place_of_pieces():
    tokenizer = build_tokenizer(4096, 3700, WORDS)
    assert tokenizer.get_vocab_size() == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert len({tokenizer.decode([i]) for i in range(259, 3700)}) == 3700 - 259
    assert [tokenizer.token_to_id(piece) for piece in word_pieces(WORDS)] == list(
        range(3702, 3702 + len(word_pieces(WORDS)))
    )
    for word in WORDS:
        (token,) = tokenizer.encode(word, add_special_tokens=False).ids
        assert tokenizer.decode([token]) == word


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((" rouge", " fiancé"), "no word of printable ASCII"),
        ((" two words",), "no word of printable ASCII"),
        (("red ",), "no word of printable ASCII"),
        (("  red",), "no word of printable ASCII"),
        (("red\n",), "no word of printable ASCII"),
        ((" red", "red"), "words='red': stands there with and without its blank"),
    ],
)
def test_words_that_cannot_be_tokens_are_refused(words, said):
    with pytest.raises(EosError, match=said):
        word_pieces(words)


def test_words_without_room_are_refused():
    with pytest.raises(EosError, match="vocab_size=261"):
        build_tokenizer(words=("red",))
    assert word_pieces((" red",)) == ["Ġr", "Ġre", "Ġred"]
