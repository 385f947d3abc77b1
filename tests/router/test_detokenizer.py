"""Pieces of text add up to what decoding all at once gives, and are never half characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from router.detokenizer import MAX_PENDING, REPLACEMENT, Detokenizer
from tests.router.conftest import MODEL

WORDS = ["▁the", "▁cat", "▁", "the", "▁die", "ä", "ö", "▁ä"]


def metaspace_with_byte_fallback() -> Tokenizer:
    """As Llama 2's: spaces are part of words, unknown characters are spelled in bytes."""
    pieces = ["<unk>", "<s>", "</s>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(33, 127)]
    pieces += [word for word in WORDS if word not in pieces]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = metaspace_with_byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


TOKENIZERS = {
    "byte-level": Tokenizer.from_file(str(MODEL / "tokenizer.json")),
    "metaspace": metaspace(),
    "metaspace, byte fallback": metaspace_with_byte_fallback(),
}
BYTE_LEVEL = TOKENIZERS["byte-level"]

texts = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" thecatäö😀€")), max_size=30
)
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


@kinds
@given(text=texts)
def test_pieces_add_up(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, text)
    assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids)


@kinds
@given(text=texts, cut=st.integers(0, 30))
def test_a_prompt_goes_on_with_its_spaces(kind: str, text: str, cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, "the cat" + text)
    cut = min(cut, len(ids) - 1) + 1
    if REPLACEMENT not in text:
        prefixes = (tokenizer.decode(ids[:end]) for end in range(cut, 0, -1))
        whole_characters = next(prefix for prefix in prefixes if REPLACEMENT not in prefix)
        new = "".join(pieces(tokenizer, ids[:cut], ids[cut:]))
        assert whole_characters + new == tokenizer.decode(ids)


@kinds
@given(text=texts)
def test_no_half_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces(tokenizer, [], encode(tokenizer, text)))


@given(ids=st.lists(st.integers(6, BYTE_LEVEL.get_vocab_size() - 1), max_size=60))
def test_any_bytes_add_up(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, [], ids)) == BYTE_LEVEL.decode(ids)


@given(ids=st.lists(st.sampled_from(encode(BYTE_LEVEL, "\x80é€😀 a")), max_size=80))
def test_broken_characters_add_up(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, [], ids)) == BYTE_LEVEL.decode(ids)


@given(ids=st.lists(st.integers(0, 3 + 256 + 40), max_size=60))
def test_byte_fallback_takes_any_ids(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["metaspace, byte fallback"]
    shown = "".join(pieces(tokenizer, [], ids))
    if REPLACEMENT not in tokenizer.decode(ids):
        assert shown == tokenizer.decode(ids)


def test_each_character_comes_with_its_last_byte() -> None:
    ids = encode(BYTE_LEVEL, "😀€")
    assert len(ids) > 4
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    shown = [detokenizer.feed(token_id) for token_id in ids]
    assert [text for text in shown if text] == ["😀", "€"]
    assert shown[-1] == "€"


def test_an_unfinished_character_is_flushed() -> None:
    ids = encode(BYTE_LEVEL, "ab😀")[:-1]
    assert pieces(BYTE_LEVEL, [], ids)[-1] == REPLACEMENT


def test_a_prompt_may_end_within_a_character() -> None:
    ids = encode(BYTE_LEVEL, "x😀y")
    middle = ids.index(encode(BYTE_LEVEL, "😀")[-1])
    assert "".join(pieces(BYTE_LEVEL, ids[:middle], ids[middle:])) == "😀y"


def test_bytes_that_make_no_character_do_not_pile_up() -> None:
    first_byte = encode(BYTE_LEVEL, "😀")[0]
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    shown = "".join(detokenizer.feed(first_byte) for _ in range(10 * MAX_PENDING))
    assert len(shown) > 8 * MAX_PENDING
    assert shown + detokenizer.flush() == BYTE_LEVEL.decode([first_byte] * 10 * MAX_PENDING)


def test_a_bad_byte_leaves_what_was_shown_alone() -> None:
    tokenizer = TOKENIZERS["metaspace, byte fallback"]
    smile = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    letter = tokenizer.token_to_id("a")
    ids = [*smile, smile[0], letter]
    assert "".join(pieces(tokenizer, [], ids)) == "😀\ufffda"
    assert "".join(pieces(tokenizer, [], ids[:-1])) == "😀\ufffd"


def test_special_tokens_are_hidden_or_shown() -> None:
    ids = [*encode(BYTE_LEVEL, "a"), 1, *encode(BYTE_LEVEL, " b")]
    assert "".join(pieces(BYTE_LEVEL, [], ids)) == "a b"
    shown = pieces(BYTE_LEVEL, [], ids, skip_special_tokens=False)
    assert "".join(shown) == "a<|eos|> b"


def test_a_hidden_token_leaves_the_next_word_its_space() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    cat = tokenizer.token_to_id("▁cat")
    assert "".join(pieces(tokenizer, [cat], [cat, 2, cat])) == " cat cat"
    assert "".join(pieces(tokenizer, [1, 2], [cat])) == "cat"
