"""What is shown of a sequence, and how it ends."""

from __future__ import annotations

import pytest

from router.generation import TokenChunk
from router.output import Output
from router.text import TextModel

EOS = 1


def letters(text: TextModel, word: str) -> list[int]:
    """One token a letter."""
    return [text.tokenizer.token_to_id(letter) for letter in word]


def test_the_stop_token_is_counted_but_not_shown(text: TextModel) -> None:
    output = Output(0, text.detokenizer([], skip_special_tokens=False))
    piece = output.push(TokenChunk([*letters(text, "ab"), EOS], "stop"))
    assert (piece.text, piece.finish_reason, piece.token_ids[-1]) == ("ab", "stop", EOS)


def test_the_stop_token_can_be_shown(text: TextModel) -> None:
    output = Output(0, text.detokenizer([], skip_special_tokens=False), include_stop=True)
    assert output.push(TokenChunk([EOS], "stop")).text == "<|eos|>"


def test_a_stop_string_ends_within_a_chunk(text: TextModel) -> None:
    output = Output(0, text.detokenizer([]), ["cd"])
    assert output.push(TokenChunk(letters(text, "ab"))).text == "ab"
    piece = output.push(TokenChunk(letters(text, "xcdef"), "length"))
    assert (piece.text, piece.finish_reason) == ("x", "stop")
    assert piece.token_ids == letters(text, "xcd")


def test_what_may_begin_a_stop_string_comes_at_the_end(text: TextModel) -> None:
    output = Output(0, text.detokenizer([]), ["cd"])
    assert output.push(TokenChunk(letters(text, "abc"))).text == "ab"
    assert output.push(TokenChunk([EOS], "stop")).text == "c"


@pytest.mark.parametrize("chunked", [1, 2, 5])
def test_min_tokens_hold_back_stop_strings(text: TextModel, chunked: int) -> None:
    output = Output(0, text.detokenizer([]), ["ab"], min_tokens=3)
    ids = letters(text, "ababab")
    pieces = [output.push(TokenChunk(ids[i : i + chunked])) for i in range(0, len(ids), chunked)]
    ended = next(i for i, piece in enumerate(pieces) if piece.finish_reason)
    # The first "ab" and the "a" of the second are among the first three tokens.
    assert "".join(piece.text for piece in pieces[: ended + 1]) == "abab"


def test_an_unfinished_character_is_shown_at_the_end(text: TextModel) -> None:
    ids = text.tokenizer.encode("😀", add_special_tokens=False).ids
    output = Output(0, text.detokenizer([]))
    assert output.push(TokenChunk(ids[:-1], "length")).text == "\ufffd"


def test_an_end_without_tokens(text: TextModel) -> None:
    output = Output(0, text.detokenizer([]), ["bc"])
    assert output.push(TokenChunk(letters(text, "ab"))).text == "a"
    assert output.push(TokenChunk([], "length")).text == "b"
