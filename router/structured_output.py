"""The fields that ask for structured output, OpenAI's and vLLM's, and the grammar they mean."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from protocol.errors import InvalidRequestError
from protocol.sampling import Grammar
from router.schema_base import Body, refuse

JsonSchema = dict[str, Any] | str  # a schema, or its text
NonEmpty = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[NonEmpty], Field(min_length=1)]

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


class NamedSchema(Body):
    """``response_format.json_schema``. It is always obeyed, ``strict`` or not."""

    name: str = ""
    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required with this type")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the output must be; None: any text."""
        if self.json_schema is not None and self.type == "json_schema":
            return _of_schema(self.json_schema.content)
        return Grammar(kind="json_object") if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    schema_: JsonSchema | None = Field(None, alias="json")
    json_object: bool = False
    regex: NonEmpty | None = None
    choice: Choices | None = None
    grammar: NonEmpty | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        refuse(self.model_extra or {}, _UNSUPPORTED, "structured_outputs.")
        if len(self.meanings) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self

    @property
    def meanings(self) -> list[Grammar]:
        """The grammar of each field given."""
        meanings = _meanings(self.schema_, self.regex, self.choice, self.grammar)
        return [*meanings, Grammar(kind="json_object")] if self.json_object else meanings


class StructuredOptions(Body):
    """The part of a body that says what form the output has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None  # these four: vLLM's former names
    guided_regex: NonEmpty | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmpty | None = None

    def grammar(self) -> tuple[Grammar, str] | None:
        """The grammar and the field that asks for it. Raises InvalidRequestError for two."""
        guided = {
            "guided_json": _meanings(schema=self.guided_json),
            "guided_regex": _meanings(regex=self.guided_regex),
            "guided_choice": _meanings(choice=self.guided_choice),
            "guided_grammar": _meanings(lark=self.guided_grammar),
        }
        if self.structured_outputs is not None:
            guided["structured_outputs"] = self.structured_outputs.meanings
        if self.response_format is not None and self.response_format.grammar is not None:
            guided["response_format"] = [self.response_format.grammar]
        asked = [(grammar, field) for field, grammars in guided.items() for grammar in grammars]
        if len(asked) > 1:
            message = f"{asked[1][1]} cannot be combined with {asked[0][1]}"
            raise InvalidRequestError(message, asked[1][1])
        return asked[0] if asked else None


def _meanings(
    schema: JsonSchema | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    lark: str | None = None,
) -> list[Grammar]:
    grammars = []
    if schema is not None:
        grammars.append(_of_schema(schema))
    if regex is not None:
        grammars.append(Grammar(kind="regex", text=regex))
    if choice is not None:
        grammars.append(Grammar(kind="choice", text=json.dumps(choice, ensure_ascii=False)))
    if lark is not None:
        grammars.append(Grammar(kind="lark", text=lark))
    return grammars


def _of_schema(schema: JsonSchema) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Grammar(kind="json_schema", text=text)
