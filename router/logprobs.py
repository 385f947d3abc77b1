"""Log probabilities in the two shapes of OpenAI's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.sampling import TokenLogprobs
from router.token_bytes import TokenBytes

IMPOSSIBLE = -9999.0  # what OpenAI writes for minus infinity, which JSON has not


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the prompt or the output. ``logprobs`` is None for a prompt's first token."""

    token_id: int
    offset: int  # characters of the choice's text before it
    logprobs: TokenLogprobs | None


def completion_logprobs(tokens: Sequence[ScoredToken], names: TokenBytes) -> dict[str, Any]:
    """As completions have them. The token itself is always among ``top_logprobs``."""
    return {
        "tokens": [names.text_of(token.token_id) for token in tokens],
        "token_logprobs": [
            None if token.logprobs is None else _finite(token.logprobs.logprob) for token in tokens
        ],
        "top_logprobs": [_alternatives(token, names) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], names: TokenBytes) -> dict[str, Any]:
    """As chats have them."""
    content = []
    for token in tokens:
        assert token.logprobs is not None  # a chat shows no prompt
        top = [_entry(token_id, logprob, names) for token_id, logprob in token.logprobs.top]
        content.append(
            {**_entry(token.token_id, token.logprobs.logprob, names), "top_logprobs": top}
        )
    return {"content": content, "refusal": None}


def _alternatives(token: ScoredToken, names: TokenBytes) -> dict[str, float] | None:
    if token.logprobs is None:
        return None
    alternatives: dict[str, float] = {}
    for token_id, logprob in [*token.logprobs.top, (token.token_id, token.logprobs.logprob)]:
        alternatives.setdefault(names.text_of(token_id), _finite(logprob))  # the best of a name
    return alternatives


def _entry(token_id: int, logprob: float, names: TokenBytes) -> dict[str, Any]:
    return {
        "token": names.text_of(token_id),
        "logprob": _finite(logprob),
        "bytes": list(names.bytes_of(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)
