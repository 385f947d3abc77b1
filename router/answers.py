"""The bodies of answers, whole or as the chunks of a stream, in OpenAI's two shapes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from router.logprobs import ScoredToken, chat_logprobs, completion_logprobs
from router.output import Piece
from router.token_bytes import TokenBytes
from router.tool_calls import ToolCallDelta, whole_calls


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every chunk of an answer repeats."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    def fields(self, kind: str) -> dict[str, Any]:
        """The head as JSON, with its ``object``."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class Shape(Protocol):
    """How an endpoint words its choices. Log probabilities are shown if there are ``names``."""

    whole: ClassVar[str]  # the answer's ``object``
    chunk: ClassVar[str]  # a chunk's ``object``

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice's chunk before any token, if there is one."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice's chunk."""
        ...

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice as a whole."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """``/v1/completions``."""

    names: TokenBytes | None
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """None: text needs no opening."""
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        """New text."""
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": completion_logprobs(piece.scored, self.names) if self.names else None,
            "finish_reason": piece.finish_reason,
        }

    def choice(self, piece: Piece) -> dict[str, Any]:
        """All text."""
        return self.delta(piece)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """``/v1/chat/completions``."""

    names: TokenBytes | None
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The speaker's role."""
        return _chat_choice(index, "delta", {"role": "assistant", "content": ""}, None, None)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """New text."""
        content: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.reasoning:
            content["reasoning_content"] = piece.reasoning
        calls = [_call_delta(call) for call in piece.tool_calls if not call.malformed]
        if calls:
            content["tool_calls"] = calls
        logprobs = self._logprobs(piece.scored)
        return _chat_choice(piece.index, "delta", content, logprobs, piece.finish_reason)

    def choice(self, piece: Piece) -> dict[str, Any]:
        """The message."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.tool_calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": _function(call)}
                for call in piece.tool_calls
            ]
        logprobs = self._logprobs(piece.scored)
        return _chat_choice(piece.index, "message", message, logprobs, piece.finish_reason)

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        return chat_logprobs(scored, self.names) if self.names else None


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Token counts, stop tokens included. Prompt tokens in the cache were not computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one sequence as one, with whole tool calls."""
    return Piece(
        index=pieces[-1].index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        finish_reason=pieces[-1].finish_reason,
        scored=[token for piece in pieces for token in piece.scored],
        total_logprob=sum(piece.total_logprob for piece in pieces),
        num_cached_tokens=pieces[0].num_cached_tokens,
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=whole_calls([call for piece in pieces for call in piece.tool_calls]),
    )


def best(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The ``count`` whole sequences with the highest mean log probability, best first."""
    return sorted(pieces, key=lambda p: -p.total_logprob / max(len(p.token_ids), 1))[:count]


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    first = {"id": call_id(), "type": "function"} if call.name is not None else {}
    return {"index": call.index, **first, "function": _function(call)}


def _function(call: ToolCallDelta) -> dict[str, Any]:
    name = {"name": call.name} if call.name is not None else {}
    return {**name, "arguments": call.arguments}


def call_id() -> str:
    """Nine letters or digits: the only form that the chat templates of Mistral's models take."""
    return secrets.token_hex(5)[:9]


def _chat_choice(
    index: int,
    key: str,
    content: dict[str, Any],
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": logprobs, "finish_reason": finish_reason}
