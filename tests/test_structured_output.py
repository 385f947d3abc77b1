"""Which grammars are understood: what cannot be enforced is refused by name, never ignored."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from protocol.errors import InvalidRequestError
from protocol.grammar import check
from protocol.sampling import Grammar
from tests.engine.schemas import REFUSED, SCHEMAS, Schema, obj


def of_schema(schema: Schema) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def test_every_schema_is_understood() -> None:
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(schema)
        check(of_schema(schema))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name_wherever_it_stands(reason: str) -> None:
    schema = REFUSED[reason]
    for whole in (schema, obj({"deep": schema}), {"type": "array", "items": schema, "minItems": 1}):
        with pytest.raises(InvalidRequestError, match=f"^json_schema: (?s:.*){reason}"):
            check(of_schema(whole))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{'a'}", "^json_schema: key must be a string"),
        ("json_schema", "[]", "^json_schema: Expecting object"),
        ("json_schema", '{"items": ' * 500, "^json_schema: recursion limit"),
        ("regex", "(", "unclosed group"),
        ("regex", r"\bword", "^regex: .*lookaround"),
        ("choice", "[", "^choice: "),
        ("choice", "[" * 100_000, "^choice: .*recursion"),
        ("choice", "[]", "^choice: not a list of strings with at least one$"),
        ("choice", '["a", 1]', "^choice: not a list of strings"),
        ("choice", '"a"', "^choice: not a list of strings"),
        ("lark", "start: nowhere", '^lark: .*unknown name: "nowhere"'),
        ("lark", "start: " + "(" * 10_000, "^lark: .*too deeply nested"),
    ],
)
def test_what_is_malformed_is_refused_with_the_reason(kind: str, text: str, reason: str) -> None:
    grammar = Grammar(kind=kind, text=text)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=reason):
        check(grammar)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("choice", '["", "a \\"b\\" \\\\ \\n", "🙂"]'),
        ("regex", "[0-9]+|(é|ü){2}"),
        ("lark", 'start: "(" start ")" | /[a-z]+/'),
    ],
)
def test_every_other_kind_is_understood(kind: str, text: str) -> None:
    check(Grammar(kind=kind, text=text))  # type: ignore[arg-type]
