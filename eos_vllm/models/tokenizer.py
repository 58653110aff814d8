"""A byte-level tokenizer: takes any text, needs no training data, and fits any vocabulary of 261 tokens or more.

Ids: 0 unknown, 1 begin, 2 end, 3 to 258 the bytes, then filler words up to the image token, the image token, the
padding token, and filler words to the end. Fillers exist so that a model of a real vocabulary can generate any id and
have it decoded; text is never encoded to them, so one token is one byte of UTF-8.

A model of few words may have them as single tokens: each word, and each of its beginnings, then stands behind the
padding token in place of fillers, and any other text still goes byte by byte. No filler is spelled as one of them.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from eos_vllm.core.errors import EosError

UNK, BOS, EOS, IMAGE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_BYTE_ID = 3
FIRST_FREE_ID = FIRST_BYTE_ID + 256
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
_SPACE = "Ġ"  # how byte-level tokenizers write a blank


def _byte_characters() -> list[str]:
    """Return the characters that stand for bytes 0 to 255 in byte-level tokenizers, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code_points = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(code_points[byte]) for byte in range(256)]


def _filler(number: int) -> str:
    """Return the invented word number `number`, two or three syllables behind a blank, all different below 10^6."""
    low, high = number % 10_000, number // 10_000
    word = _SYLLABLES[low // 100] + _SYLLABLES[low % 100]
    return _SPACE + word + (_SYLLABLES[high - 1] if high else "")


def word_pieces(words: Sequence[str]) -> list[str]:
    """Return the words and all their beginnings of two bytes or more, in byte-level spelling, shorter ones first.

    Words merge from their start, one way only: with " red", the merges of "red" would tear up the longer word.
    Raises EosError if a word is not of printable ASCII, has a blank elsewhere than in front, or stands there both with
    and without its blank.
    """
    for word in words:
        bare = word.removeprefix(" ")
        if not (bare.isascii() and bare.isprintable()) or " " in bare:
            raise EosError("words", word, "is no word of printable ASCII", "leave out all blanks but one in front")
        if word != bare and bare in words:
            raise EosError("words", bare, "stands there with and without its blank", "keep one of the two")
    spelled = [word.replace(" ", _SPACE) for word in words]
    pieces = {word[:end] for word in spelled for end in range(2, len(word) + 1)}
    return sorted(pieces, key=lambda piece: (len(piece), piece))


def build_tokenizer(
    vocab_size: int = FIRST_FREE_ID + 2, image_token_id: int = FIRST_FREE_ID, words: Sequence[str] = ()
) -> Tokenizer:
    """Return the tokenizer with ids 0 to `vocab_size` - 1, `<image>` at `image_token_id` and `<pad>` behind it.

    Encoding with special tokens puts the begin token in front; decoding returns any text unchanged. `words` become
    single tokens (`word_pieces` says how many ids that takes).
    Raises EosError if the ids don't fit into the vocabulary, or a word is none that can be a token.
    """
    if not FIRST_FREE_ID <= image_token_id <= vocab_size - 2:
        raise EosError(
            "image_token_id",
            image_token_id,
            f"is outside {FIRST_FREE_ID} to vocab_size - 2 = {vocab_size - 2}",
            "choose another id or a larger vocab_size",
        )
    specials = {UNK: UNK_ID, BOS: BOS_ID, EOS: EOS_ID, IMAGE: image_token_id, PAD: image_token_id + 1}
    vocabulary = dict(specials)
    vocabulary.update({character: FIRST_BYTE_ID + byte for byte, character in enumerate(_byte_characters())})
    pieces = word_pieces(words)
    if image_token_id + 2 + len(pieces) > vocab_size:
        needed = image_token_id + 2 + len(pieces)
        raise EosError("vocab_size", vocab_size, f"has no room for {len(pieces)} pieces of words", f"choose {needed}")
    vocabulary.update({piece: image_token_id + 2 + i for i, piece in enumerate(pieces)})
    taken = set(vocabulary.values())
    # A filler that is a piece of a word already gives way to one whose number no other id has.
    spare = (filler for filler in map(_filler, itertools.count(vocab_size)) if filler not in vocabulary)
    for i in range(vocab_size):
        if i not in taken:
            filler = _filler(i)
            vocabulary[next(spare) if filler in vocabulary else filler] = i

    # Without merges every byte stays a token of its own.
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=bool(words))
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Return `tokenizer_config.json` for a model of at most `max_length` positions."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "extra_special_tokens": {"image_token": IMAGE},
    }
