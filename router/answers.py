"""The bodies of answers, whole or as the chunks of a stream, in OpenAI's two shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from router.output import Piece


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
    """How an endpoint words its choices. ``prompt`` is given to show its ids, or is None."""

    whole: ClassVar[str]  # the answer's ``object``
    chunk: ClassVar[str]  # a chunk's ``object``

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice's chunk before any token, if there is one."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice's chunk."""
        ...

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A choice as a whole."""
        ...


class CompletionShape:
    """``/v1/completions``."""

    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """None: text needs no opening."""
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        """New text."""
        return _text_choice(piece.index, piece.text, piece.finish_reason)

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """All text."""
        return _text_choice(index, text, finish_reason)


class ChatShape:
    """``/v1/chat/completions``."""

    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The speaker's role."""
        return _chat_choice(index, "delta", {"role": "assistant", "content": ""}, None)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """New text."""
        content = {"content": piece.text} if piece.text else {}
        return _chat_choice(piece.index, "delta", content, piece.finish_reason)

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return _chat_choice(index, "message", message, finish_reason)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts, the stop token included."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def whole_choice(shape: Shape, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """One choice of an answer that is not streamed, from all its pieces."""
    reason = pieces[-1].finish_reason
    assert reason is not None
    return shape.choice(index, "".join(piece.text for piece in pieces), reason)


def _text_choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _chat_choice(
    index: int, key: str, content: dict[str, Any], finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": None, "finish_reason": finish_reason}
