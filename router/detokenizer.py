"""Turns one sequence's token ids into text as they come, never half a character.

Decoding a token alone is wrong: a character may span tokens, and some decoders drop the first
token's leading space. So a short window is decoded with and without its newest tokens, and the
difference is the new text. An unfinished character decodes to U+FFFD, and is held back until it
is finished, or until ``flush``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
BYTES_OF_CHARACTER = 4  # at most, in UTF-8; no token has less than one
PROMPT_TOKENS = 2 * BYTES_OF_CHARACTER  # of the prompt's end: a character and the next one's begin
MAX_PENDING = 16  # tokens; so many are not one unfinished character


class Decoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of some token ids."""
        ...


class Detokenizer:
    """Text of one sequence. Starts after the prompt, whose last tokens are the context."""

    def __init__(
        self, decoder: Decoder, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        shown, self._pending_ids = self._split(list(prompt_token_ids[-PROMPT_TOKENS:]))
        self._shown_ids = shown
        self._shown = self._decode(shown)  # text of those ids

    def feed(self, token_id: int) -> str:
        """The text that is certain now that this token has come; often none."""
        self._pending_ids.append(token_id)
        text = self._decode(self._shown_ids + self._pending_ids)
        if not text.endswith(REPLACEMENT):
            new = self._added(text)
            if new:
                self._show(self._pending_ids)
            return new
        if len(self._pending_ids) <= MAX_PENDING:
            return ""
        # Bytes that make no character: all but the last, which may yet begin one, are final.
        new = self._added(text)[:-1]
        self._show(self._pending_ids[-BYTES_OF_CHARACTER:])
        self._shown = self._shown[:-1]
        return new

    def flush(self) -> str:
        """What was held back, at the sequence's end."""
        new = self._added(self._decode(self._shown_ids + self._pending_ids))
        self._show(self._pending_ids)
        return new

    def _show(self, token_ids: list[int]) -> None:
        self._shown_ids, self._pending_ids = token_ids, []
        self._shown = self._decode(token_ids)

    def _added(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # Byte fallback: one bad byte spoils all bytes around it, those already shown too.
        return self._decode(self._pending_ids)

    def _split(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """The prompt's end as whole characters, and the tokens of a character cut by its end."""
        for end in range(len(prompt), len(prompt) - BYTES_OF_CHARACTER, -1):
            for start in range(max(end, 0)):
                if REPLACEMENT not in self._decode(prompt[start:end]):
                    return prompt[start:end], prompt[end:]
        return [], []

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
