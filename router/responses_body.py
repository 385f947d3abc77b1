"""The body of ``POST /v1/responses``, and the chat that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from protocol.errors import InvalidRequestError
from protocol.sampling import Grammar
from router.responses_input import Input, chat_messages
from router.schema_base import Body, refuse
from router.schemas import UNSUPPORTED, ChatBody, SamplingOptions
from router.tools import MAX_TOOLS, Function, Tool

MAX_METADATA = 16  # pairs, as at OpenAI

# Field: the values that ask for nothing beyond what is always done. Those of a chat are among
# them, unless a response has them too: to ignore one would be a surprise.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(ChatBody.model_fields, ()),
    **UNSUPPORTED,
    "access_programs": (),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "include": ([], ["reasoning.encrypted_content"]),  # thoughts are given in clear
    "prompt": (),
    "stream_options": ({"include_obfuscation": False},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


class TextFormat(Body):
    """``text.format``. A schema is always obeyed, ``strict`` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.content is None):
            raise ValueError("name and schema are required with this type")
        return self

    def response_format(self) -> dict[str, Any]:
        """The same as a chat's ``response_format``."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.content}}


class TextOptions(Body):
    """``text``."""

    format: TextFormat = TextFormat(type="text", schema=None)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        refuse(self.model_extra or {}, {"verbosity": ("medium",)}, "text.")
        return self


class ReasoningOptions(Body):
    """``reasoning``. Whether a model thinks is its template's own matter."""

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        refuse(self.model_extra or {}, {"effort": (), "summary": ()}, "reasoning.")
        return self


class FunctionTool(Function):
    """A tool that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, fields: Any) -> Any:
        kind = fields.get("type", "function") if isinstance(fields, dict) else "function"
        if kind != "function":
            raise ValueError(f"is of type {kind!r}; only functions are supported")
        return fields

    def for_chat(self) -> Tool:
        """The same as a chat's tool."""
        function = Function(**self.model_dump(exclude={"type"}, exclude_unset=True))
        return Tool(type=self.type, function=function)


def _choice(value: object) -> object:
    match value:
        case {"type": "function", "name": str()} | "none" | "auto" | "required":
            return value
        case _:
            raise ValueError('must be none, auto, required or {"type": "function", "name":}')


class FunctionChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice


class ResponseChat(ChatBody):
    """A response's request as the chat that it is; errors name the response's own fields."""

    id_prefix = "resp_"
    prompt_field = "input"

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_output_tokens"

    def grammar(self) -> tuple[Grammar, str] | None:
        """The grammar and the field that asks for it."""
        asked = super().grammar()
        return None if asked is None else (asked[0], "text.format")


class ResponsesBody(SamplingOptions):
    """POST /v1/responses. All that a response is made of is in its body."""

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(_choice, json_schema_input_type=ToolChoice)
    ] = "auto"
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)
    user: str | None = None
    store: bool = True
    background: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        extra = self.model_extra or {}
        if "previous_response_id" in extra:
            message = "previous_response_id is not supported: send the earlier items in input"
            raise InvalidRequestError(message, "previous_response_id")
        refuse(extra, _UNSUPPORTED)
        if self.background and self.stream:
            raise InvalidRequestError("background cannot be combined with stream", "background")
        if self.background and not self.store:
            raise InvalidRequestError("background needs store true", "background")
        return self

    def chat(self) -> ResponseChat:
        """The chat whose answer is the response. Raises InvalidRequestError."""
        sampling = self.model_fields_set & SamplingOptions.model_fields.keys()
        choice: object = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        return ResponseChat.model_validate(
            {
                **{name: getattr(self, name) for name in sampling},
                "messages": chat_messages(self.instructions, self.input),
                "max_completion_tokens": self.max_output_tokens,
                "response_format": self.text.format.response_format(),
                "tools": [tool.for_chat() for tool in self.tools],
                "tool_choice": choice,
                "parallel_tool_calls": self.parallel_tool_calls,
                "chat_template_kwargs": self.chat_template_kwargs,
            }
        )

    def echo(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        choice = self.tool_choice
        return {
            "background": self.background,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": self.store,
            "temperature": self.temperature,
            "text": {"format": self.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
            "tools": [tool.model_dump(exclude_none=True) for tool in self.tools],
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }
