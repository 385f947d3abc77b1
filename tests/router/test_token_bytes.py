"""The bytes of tokens, for both ways in which tokenizers write them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from router.text import TextModel
from router.token_bytes import TokenBytes


@pytest.mark.parametrize("words", ["Héllo 😀, wörld\n", " a\tb\x00", "\u00a0\u00ad\x7f"])
def test_byte_level_tokens_add_up_to_the_text(text: TextModel, words: str) -> None:
    names = TokenBytes(text.tokenizer)
    ids = text.tokenizer.encode(words, add_special_tokens=False).ids
    assert b"".join(map(names.bytes_of, ids)) == words.encode()


def test_half_a_character_is_named_by_its_bytes(text: TextModel) -> None:
    names = TokenBytes(text.tokenizer)
    shown = [names.text_of(i) for i in text.tokenizer.encode("😀", add_special_tokens=False).ids]
    assert shown[0].startswith("bytes:\\xf0")


def test_sentencepiece_tokens() -> None:
    vocabulary = {"<0xE2>": 0, "\u2581the": 1, "é": 2}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    names = TokenBytes(tokenizer)
    assert [names.bytes_of(i) for i in range(5)] == [b"\xe2", b" the", "é".encode(), b"<s>", b""]
