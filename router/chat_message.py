"""One message of a chat: as it is sent, and as chat templates know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from protocol.errors import InvalidRequestError
from router.schema_base import Body, refuse
from router.tools import ToolCall

Content = str | list[dict[Literal["type", "text"], str]]

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": (),
}


def text_of(value: object, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a content, whose parts are of these types. Raises ValueError."""
    match value:
        case str():
            return value
        case [_, *_]:
            return "\n".join(_text_part(part, kinds) for part in value)
        case _:
            raise ValueError("must be a string or a list of text parts")


def _text_part(part: object, kinds: Sequence[str]) -> str:
    match part:
        case {"type": str(kind), "text": str(text)} if kind in kinds:
            return text
        case {"type": str(kind)} if kind not in kinds:
            raise ValueError(f"has a part of type {kind!r}; only text is supported")
        case _:
            example = f'{{"type": "{kinds[0]}", "text": "..."}}'
            raise ValueError(f"must hold parts like {example}")


class ChatMessage(Body):
    """One turn. A content of several text parts is joined with newlines.

    Only a message that calls tools may have none.
    """

    role: str = Field(min_length=1)
    content: Annotated[str, BeforeValidator(text_of, json_schema_input_type=Content)] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        refuse(self.model_extra or {}, _UNSUPPORTED, "messages.")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise InvalidRequestError("messages.content is required", "messages.content")
        if self.tool_calls and self.role != "assistant":
            message = f"messages.tool_calls: the role {self.role!r} calls no tools"
            raise InvalidRequestError(message, "messages.tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        for name in ("name", "reasoning_content", "tool_call_id"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = value
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return fields
