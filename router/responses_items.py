"""The output items of ``/v1/responses`` and the events that tell how each grows. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from router.answers import call_id

Status = Literal["in_progress", "completed", "incomplete"]
Event = dict[str, Any]  # with its ``type``, without item, place and number


class OutputItem(Protocol):
    """An item of the output, in the order of the output."""

    id: str
    status: Status

    def present(self) -> dict[str, Any]:
        """The item as it is now."""
        ...

    def opening(self) -> Sequence[Event]:
        """What follows the item's being added."""
        ...

    def grow(self, text: str) -> Sequence[Event]:
        """More of it."""
        ...

    def closing(self) -> Sequence[Event]:
        """What comes before the item's being done."""
        ...


@dataclass(frozen=True, slots=True)
class TextKind:
    """What is different between a message and thoughts."""

    prefix: str  # of the ids
    fields: dict[str, Any]  # of the item
    part: dict[str, Any]  # the part that holds the text
    event: str  # the beginning of the text's events
    extra: dict[str, Any]  # of these events


MESSAGE = TextKind(
    prefix="msg_",
    fields={"type": "message", "role": "assistant"},
    part={"type": "output_text", "annotations": [], "logprobs": []},
    event="response.output_text",
    extra={"logprobs": []},
)
REASONING = TextKind(
    prefix="rs_",
    fields={"type": "reasoning", "summary": []},
    part={"type": "reasoning_text"},
    event="response.reasoning_text",
    extra={},
)


@dataclass(slots=True, eq=False)
class TextItem:
    """A message or thoughts: one part of text."""

    kind: TextKind
    id: str = field(init=False)
    status: Status = "in_progress"
    _texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = _id(self.kind.prefix)

    def present(self) -> dict[str, Any]:
        """Without a part until there is text."""
        content = [self._part()] if self._texts else []
        return {"id": self.id, **self.kind.fields, "status": self.status, "content": content}

    def opening(self) -> Sequence[Event]:
        """Its part begins."""
        return ({"type": "response.content_part.added", "content_index": 0, "part": self._part()},)

    def grow(self, text: str) -> Sequence[Event]:
        """A delta."""
        self._texts.append(text)
        return (self._text_event("delta", delta=text),)

    def closing(self) -> Sequence[Event]:
        """The whole text and the whole part."""
        part = self._part()
        return (
            self._text_event("done", text=part["text"]),
            {"type": "response.content_part.done", "content_index": 0, "part": part},
        )

    def _part(self) -> dict[str, Any]:
        return {**self.kind.part, "text": "".join(self._texts)}

    def _text_event(self, name: str, **fields: str) -> Event:
        kind = self.kind
        return {"type": f"{kind.event}.{name}", "content_index": 0, **fields, **kind.extra}


@dataclass(slots=True, eq=False)
class CallItem:
    """A call of a function."""

    index: int  # among the calls of its response
    name: str
    id: str = field(default_factory=lambda: _id("fc_"))
    call_id: str = field(default_factory=call_id)
    status: Status = "in_progress"
    _arguments: list[str] = field(default_factory=list)

    def present(self) -> dict[str, Any]:
        """The call, with its arguments as JSON text."""
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self._arguments),
        }

    def opening(self) -> Sequence[Event]:
        """None: the item itself names the function."""
        return ()

    def grow(self, text: str) -> Sequence[Event]:
        """A delta of the arguments."""
        self._arguments.append(text)
        return ({"type": "response.function_call_arguments.delta", "delta": text},)

    def closing(self) -> Sequence[Event]:
        """The whole arguments."""
        arguments = "".join(self._arguments)
        done = "response.function_call_arguments.done"
        return ({"type": done, "name": self.name, "arguments": arguments},)


def _id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)
