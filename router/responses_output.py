"""A response from its first token to its end: pieces go in, OpenAI's events come out. Pure.

A stream is these events; a response that is not streamed is what they lead to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from protocol.errors import InvalidRequestError, KvferryError, OverloadedError
from router.answers import AnswerHead
from router.output import Piece
from router.responses_body import ResponsesBody
from router.responses_items import (
    MESSAGE,
    REASONING,
    CallItem,
    Event,
    OutputItem,
    Status,
    TextItem,
    TextKind,
)
from router.tool_calls import ToolCallDelta, whole_calls


class ResponseOutput:
    """One response. ``num_input_tokens`` are those of the rendered input."""

    def __init__(self, head: AnswerHead, body: ResponsesBody, num_input_tokens: int) -> None:
        self.status: Status | Literal["failed", "cancelled"] = "in_progress"
        self._head = head
        self._body = body
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None  # the last item, while it may grow
        self._num_events = 0
        self._num_input_tokens = num_input_tokens
        self._num_cached_tokens = 0
        self._num_output_tokens = 0
        self._num_reasoning_tokens = 0
        self._completed_at: int | None = None  # Unix seconds
        self._error: dict[str, Any] | None = None

    def begin(self) -> Sequence[Event]:
        """Before any piece."""
        return [self._of_response("created"), self._of_response("in_progress")]

    def push(self, piece: Piece) -> Sequence[Event]:
        """New output; the last piece ends the response."""
        self._num_output_tokens += len(piece.token_ids)
        self._num_cached_tokens += piece.num_cached_tokens
        broken = {call.index for call in piece.tool_calls if call.malformed}
        events: list[Event] = []
        if isinstance(self._open, CallItem) and self._open.index in broken:
            events += self._close("incomplete")  # its text comes as a message
        if piece.reasoning:
            self._num_reasoning_tokens = self._num_output_tokens
            events += self._text(REASONING, piece.reasoning)
        if piece.text:
            events += self._text(MESSAGE, piece.text)
        for call in piece.tool_calls:
            if call.index not in broken:
                events += self._call(call)
        if piece.finish_reason is not None:
            events += self._end("incomplete" if piece.finish_reason == "length" else "completed")
        return events

    def fail(self, error: KvferryError) -> Sequence[Event]:
        """No more comes, because of the error."""
        self._error = {"code": _error_code(error), "message": str(error)}
        self._stop("failed")
        return [self._of_response("failed")]

    def cancel(self) -> None:
        """No more is wanted, unless it is over."""
        if self.status == "in_progress":
            self._stop("cancelled")

    def present(self) -> dict[str, Any]:
        """The response as it is now."""
        incomplete = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": incomplete,
            "model": self._head.model,
            "output": [item.present() for item in self._items],
            "usage": None if self.status == "in_progress" else self._usage(),
            **self._body.echo(),
        }

    def _text(self, kind: TextKind, text: str) -> list[Event]:
        item = self._open
        goes_on = isinstance(item, TextItem) and item.kind is kind
        events = [] if goes_on else self._add(TextItem(kind))
        return events + self._grow(text)

    def _call(self, call: ToolCallDelta) -> list[Event]:
        events = [] if call.name is None else self._add(CallItem(call.index, call.name))
        return events + self._grow(call.arguments)

    def _add(self, item: OutputItem) -> list[Event]:
        events = self._close("completed")
        self._items.append(item)
        self._open = item
        return [*events, self._of_item("added", item), *self._within(item, item.opening())]

    def _grow(self, text: str) -> list[Event]:
        item = self._open
        assert item is not None
        return self._within(item, item.grow(text))

    def _close(self, status: Status) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        return [*self._within(item, item.closing()), self._of_item("done", item)]

    def _end(self, status: Literal["completed", "incomplete"]) -> list[Event]:
        events = self._close(status)
        self.status = status
        if status == "completed":
            self._completed_at = int(time.time())
        return [*events, self._of_response(status)]

    def _stop(self, status: Literal["failed", "cancelled"]) -> None:
        if self._open is not None:
            self._open.status = "incomplete"
        self.status = status

    def _of_response(self, name: str) -> Event:
        return self._numbered({"type": f"response.{name}", "response": self.present()})

    def _of_item(self, name: str, item: OutputItem) -> Event:
        kind = f"response.output_item.{name}"
        place = len(self._items) - 1
        return self._numbered({"type": kind, "output_index": place, "item": item.present()})

    def _within(self, item: OutputItem, events: Sequence[Event]) -> list[Event]:
        place = {"output_index": len(self._items) - 1, "item_id": item.id}
        return [self._numbered({**event, **place}) for event in events]

    def _numbered(self, event: Event) -> Event:
        number = self._num_events
        self._num_events += 1
        return {**event, "sequence_number": number}

    def _usage(self) -> dict[str, Any]:
        """Thoughts are counted up to the piece that ends them, whatever else is in it."""
        return {
            "input_tokens": self._num_input_tokens,
            "input_tokens_details": {
                "cached_tokens": self._num_cached_tokens,
                "cache_write_tokens": 0,  # those a client asks to be kept: all are kept
            },
            "output_tokens": self._num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": self._num_input_tokens + self._num_output_tokens,
        }


def without_malformed(pieces: Sequence[Piece]) -> list[Piece]:
    """All pieces of an answer, without what first looked like a call and was none."""
    calls = whole_calls([call for piece in pieces for call in piece.tool_calls])
    kept = {call.index for call in calls}
    return [
        replace(piece, tool_calls=[call for call in piece.tool_calls if call.index in kept])
        for piece in pieces
    ]


def _error_code(error: KvferryError) -> str:
    match error:
        case OverloadedError():
            return "rate_limit_exceeded"
        case InvalidRequestError():
            return "invalid_prompt"
        case _:
            return "server_error"
