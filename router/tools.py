"""The fields about tools: which there are, whether they must be called, and what that means.

A call that must be made becomes a grammar in the model's own format, so that it names a tool and
its arguments are what that tool's ``parameters`` accept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from protocol.errors import InvalidRequestError
from protocol.grammar import WHITE_SPACE
from protocol.sampling import Grammar
from router.schema_base import Body
from router.tool_formats import ToolFormat

MAX_TOOLS = 128

Name = Annotated[str, Field(min_length=1, max_length=128)]


class Function(Body):
    """A tool's function. Without ``parameters`` it takes none."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON Schema of an object
    strict: bool = False

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must be the schema of an object")
        return self


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A tool's name where it is chosen."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(Body):
    """A call in an earlier message, its arguments a JSON object's text."""

    name: Name
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        self.parsed_arguments()
        return self

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as templates take them. Raises ValueError."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"arguments: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be the text of a JSON object")
        return arguments


class ToolCall(Body):
    """A call that an earlier message made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates know it."""
        arguments = self.function.parsed_arguments()
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


def _choice(value: object) -> object:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name)}}:
            return NamedTool(type="function", function=FunctionName(name=name))
        case _:
            message = 'must be none, auto, required or {"type": "function", "function": {"name":}}'
            raise ValueError(message)


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    BeforeValidator(
        _choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool
    ),
]


class ToolOptions(Body):
    """The part of a chat's body that says what may be called."""

    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len({*names}) < len(names):
            raise InvalidRequestError("tools: two have the same name", "tools")
        if not names and self.tool_choice not in ("none", "auto"):
            raise InvalidRequestError("tool_choice needs tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            message = f"tool_choice: {self.tool_choice.function.name!r} is none of the tools"
            raise InvalidRequestError(message, "tool_choice")
        return self

    @property
    def offered_tools(self) -> Sequence[Tool]:
        """What the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def required_tools(self) -> Sequence[Tool]:
        """Those of which one must be called; empty when none must."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def only_one_call(self) -> bool:
        """Whether a message may hold one call at most."""
        return isinstance(self.tool_choice, NamedTool) or not self.parallel_tool_calls

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates know them, if there are any."""
        tools = [tool.model_dump(exclude_unset=True) for tool in self.offered_tools]
        return tools or None


def call_grammar(
    form: ToolFormat, tools: Sequence[Tool], opening_token: int | None, *, only_one: bool
) -> Grammar:
    """What calls of these tools look like. ``opening_token`` is the opening, if that is special.

    A format's ``bare`` calls are written without the opening.
    """
    opening = _literal(form.opening) if opening_token is None else f"<[{opening_token}]>"
    if form.bare:
        opening = ""
    space = '" "?' if form.array else ""  # which some tokenizers put into the array's first token
    first = f"{opening} {space} {_literal(form.array + form.padding)}"
    last = _literal(form.padding + form.closing)
    if form.separator:
        more = "" if only_one else f"({_literal(form.separator + ' ')} call)*"
        start = f"{first} call {more} {last}"
    else:
        more = "" if only_one else '("\\n" group)*'
        start = f"group {more}\ngroup: {first} call {last}"
    functions = [tool.function for tool in tools]
    rules = [f"start: {start}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for index, function in enumerate(functions):
        name = json.dumps(function.name, ensure_ascii=False)
        before = _literal(f'{{"name": {name}, "{form.arguments}": ')
        rules.append(f'call_{index}: {before} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {_arguments(function)}")
    return Grammar(kind="lark", text="\n".join(rules))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _arguments(function: Function) -> str:
    """The schema of its arguments, an object whatever else it says, with our own options."""
    schema = function.parameters
    if schema is None:
        schema = {"properties": {}, "additionalProperties": False}
    options = {"lenient": False, "whitespace_pattern": WHITE_SPACE}
    return json.dumps({**schema, "type": "object", "x-guidance": options}, ensure_ascii=False)
