"""The items of a ``/v1/responses`` input, and the chat messages that they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from protocol.errors import InvalidRequestError
from router.chat_message import ChatMessage, Content, text_of
from router.schema_base import Body
from router.tools import FunctionCall, ToolCall


def _text(*kinds: str, default: str | None = None) -> BeforeValidator:
    """Reads a content of parts of these types; ``default`` is the text of no parts."""

    def read(value: object) -> str:
        return default if value == [] and default is not None else text_of(value, kinds)

    return BeforeValidator(read, json_schema_input_type=Content)


class MessageItem(Body):
    """What somebody said. A developer is the system's voice, as in OpenAI's own models."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str, _text("input_text", "output_text", "text")]


class CallItem(FunctionCall):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)


class BrokenCallItem(Body):
    """What a stream took for a call until it broke; the message after it has its text."""

    type: Literal["function_call"]
    status: Literal["incomplete"]


class CallOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Annotated[str, _text("input_text", "output_text", "text")]


class ReasoningItem(Body):
    """What the model thought, in clear."""

    type: Literal["reasoning"]
    content: Annotated[str, _text("reasoning_text", default="")] = ""
    summary: Annotated[str, _text("summary_text", default="")] = ""

    @model_validator(mode="after")
    def _in_clear(self) -> Self:
        if (self.model_extra or {}).get("encrypted_content") is not None:
            message = "input: encrypted_content of a reasoning item is not supported"
            raise InvalidRequestError(message, "input")
        return self


def _kind(item: object) -> str | None:
    """An item's tag: its type, which a message may leave out."""
    fields = item if isinstance(item, dict) else {}
    match fields:
        case {"type": "function_call", "status": "incomplete"}:
            return "broken_call"
        case {"type": str(kind)}:
            return kind
        case _:
            return "message" if fields.get("type") is None else None


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[BrokenCallItem, Tag("broken_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="is none of the types supported: message, function_call, "
        "function_call_output, reasoning",
    ),
]


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input: TypeAlias = Annotated[
    list[Item],
    Field(min_length=1),
    BeforeValidator(_items, json_schema_input_type=str | list[Item]),
]


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[ChatMessage]:
    """The conversation of these items, after the instructions.

    Consecutive thoughts, text and calls of the model are one message, as they were generated, so
    that the prompt is the one whose KV is cached. Raises InvalidRequestError if there are none.
    """
    messages = []
    if instructions is not None:
        messages.append(ChatMessage(role="system", content=instructions))
    turn: dict[str, Any] = {}  # the model's message, as far as it is known

    def end_turn() -> None:
        if turn:
            messages.append(ChatMessage(role="assistant", **{"content": "", **turn}))
        turn.clear()

    for item in items:
        match item:
            case ReasoningItem():
                end_turn()
                if thoughts := item.content or item.summary:
                    turn["reasoning_content"] = thoughts
            case MessageItem(role="assistant"):
                if "content" in turn or "tool_calls" in turn:
                    end_turn()
                turn["content"] = item.content
            case CallItem():
                call = FunctionCall(name=item.name, arguments=item.arguments)
                turn.setdefault("tool_calls", []).append(ToolCall(id=item.call_id, function=call))
            case CallOutputItem():
                end_turn()
                output = ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
                messages.append(output)
            case MessageItem():
                end_turn()
                role = "system" if item.role == "developer" else item.role
                messages.append(ChatMessage(role=role, content=item.content))
    end_turn()
    if not messages:
        raise InvalidRequestError("input holds no message", "input")
    return messages
