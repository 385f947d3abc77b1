"""What each token of a tokenizer stands for, as bytes: a token may be less than a character."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, in tokenizers that fall back to them
_SPACE = "\u2581"  # a space, in tokenizers made by SentencePiece


class TokenBytes:
    """Bytes of token ids, special tokens included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that the tokenizer does not know."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(_SPACE, " ").encode()

    def text_of(self, token_id: int) -> str:
        r"""The token's text, or ``bytes:\xe2`` where it is no text, as OpenAI writes it."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    itself = {chr(byte): byte for byte in printable}
    return itself | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()
