"""Every way to ask for structured output, as the grammar that the workers get."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protocol.sampling import Grammar
from tests.router.conftest import Router

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]}
TEXT = json.dumps(SCHEMA, ensure_ascii=False)
OF_SCHEMA = Grammar(kind="json_schema", text=TEXT)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            OF_SCHEMA,
        ),
        ({"guided_json": SCHEMA}, OF_SCHEMA),
        ({"guided_json": TEXT}, OF_SCHEMA),
        ({"guided_regex": "a|b"}, Grammar(kind="regex", text="a|b")),
        ({"guided_choice": ["a", "é"]}, Grammar(kind="choice", text='["a", "é"]')),
        ({"guided_grammar": 'start: "a"'}, Grammar(kind="lark", text='start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object")),
        ({"structured_outputs": {"regex": "a"}}, Grammar(kind="regex", text="a")),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar(kind="choice", text='["a"]')),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Grammar(kind="lark", text='start: "a"'),
        ),
    ],
)
def test_what_is_asked_for(router: Router, fields: dict[str, Any], grammar: Grammar | None) -> None:
    router.say("a")
    for path, prompt in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = router.post(path, **prompt, **fields)
        assert answer.status_code == 200, answer.text
        assert router.generator.requests[-1].sampling.grammar == grammar
