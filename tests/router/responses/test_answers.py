"""OpenAI's Responses API: requests, and answers as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from router.chat_template import ChatTemplate
from router.generation import TokenChunk
from router.text import TextModel
from tests.router.conftest import Router, routers
from tests.router.responses.conftest import (
    BROKEN,
    CALL,
    RESPONSES,
    THOUGHTS,
    TIME,
    checked,
    events_of,
    prompt_of,
)


def refused(answer: httpx.Response) -> str:
    """The field that a 400 names."""
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"].split(".")[0] in error["message"]
    return str(error["param"])


def test_text(client: openai.OpenAI, router: Router) -> None:
    router.say("Good day.")
    router.generator.script = [
        replace(chunk, num_cached_tokens=5 if index == 0 else None)
        for index, chunk in enumerate(router.generator.script)
        if isinstance(chunk, TokenChunk)
    ]
    answer = client.responses.create(
        model="test",
        instructions="Be kind.",
        input="Hello",
        max_output_tokens=40,
        temperature=0.5,
        top_p=0.9,
        metadata={"a": "b"},
        user="me",
    )
    checked(answer)
    assert answer.output_text == "Good day."
    assert answer.status == "completed"
    assert answer.id.startswith("resp_")
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.9, 40)
    assert (answer.instructions, answer.metadata, answer.user) == ("Be kind.", {"a": "b"}, "me")
    request = router.generator.requests[-1]
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(request.prompt_token_ids)
    assert answer.usage.input_tokens_details.cached_tokens == 5
    assert answer.usage.output_tokens == len(router.generator.script)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert request.sampling.temperature == 0.5
    assert request.sampling.max_tokens == 40
    assert prompt_of(router) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]


def test_thoughts_are_counted(router: Router) -> None:
    router.say(f"{THOUGHTS}Yes.")
    usage = checked(router.post(RESPONSES, input="Why?")).usage
    assert usage is not None
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens - 2


def test_output_items_are_input_again(client: openai.OpenAI, router: Router) -> None:
    router.say(f"{THOUGHTS}Let me see.\n{CALL}\n{CALL}")
    items: list[Any] = [{"role": "developer", "content": "Be brief."}]
    items += [{"role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]}]
    first = client.responses.create(model="test", input=items, tools=[TIME])  # type: ignore[call-overload]
    items += [item.to_dict() for item in first.output]
    calls = [item for item in first.output if item.type == "function_call"]
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "Noon"}
        for call in calls
    ]
    client.responses.create(model="test", input=items, tools=[TIME])  # type: ignore[call-overload]
    function = {"name": "time", "arguments": {"zone": "UTC"}}
    assert prompt_of(router) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm, so.",
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": function} for call in calls
            ],
        },
        *({"role": "tool", "content": "Noon", "tool_call_id": call.call_id} for call in calls),
    ]
    assert calls[0].call_id != calls[1].call_id


def test_a_broken_call_is_input_again_as_its_text(router: Router) -> None:
    router.say(f"{THOUGHTS}{BROKEN}")
    question = [{"role": "user", "content": "What time is it?"}]
    output = events_of(router, input=question, tools=[TIME])[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "function_call", "message"]
    checked(router.post(RESPONSES, input=[*question, *output], tools=[TIME]))
    said = {"role": "assistant", "content": BROKEN, "reasoning_content": "Hm, so."}
    assert prompt_of(router) == [*question, said]


def test_a_response_is_the_chat_that_it_means(router: Router) -> None:
    router.say("a")
    function = {"name": "time", "description": "Tells it", "parameters": {"type": "object"}}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "function", "name": "time"}
    common: dict[str, Any] = {"temperature": 0.3, "top_k": 5, "seed": 7, "stop": ["x"]}
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_output_tokens": 9}, {"max_completion_tokens": 9}),
        (
            {"tools": [{"type": "function", **function}], "tool_choice": named},
            {
                "tools": [{"type": "function", "function": function}],
                "tool_choice": {"type": "function", "function": {"name": "time"}},
            },
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": schema},
                }
            },
        ),
        (
            {"text": {"format": {"type": "json_object"}}},
            {"response_format": {"type": "json_object"}},
        ),
    ]
    for response, chat in pairs:
        echoed = checked(router.post(RESPONSES, input="Hi", **common, **response)).to_dict()
        for name, value in response.items():
            expected = [{**tool, "strict": False} for tool in value] if name == "tools" else value
            assert echoed[name] == expected
        messages = [{"role": "user", "content": "Hi"}]
        assert (
            router.post("/v1/chat/completions", messages=messages, **common, **chat).status_code
            == 200
        )
        ours, theirs = router.generator.requests[-2:]
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        assert ours.sampling == theirs.sampling


def test_the_parse_helper(client: openai.OpenAI, router: Router) -> None:
    class Answer(BaseModel):
        a: int

    router.say('{"a": 5}')
    answer = client.responses.parse(model="test", input="Hi", text_format=Answer)
    assert answer.output_parsed == Answer(a=5)
    grammar = router.generator.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("include", {"include": ["message.output_text.logprobs"]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("truncation", {"truncation": "auto"}),
        ("reasoning.effort", {"reasoning": {"effort": "high"}}),
        ("reasoning.summary", {"reasoning": {"summary": "auto"}}),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("max_tokens", {"max_tokens": 5}),
        ("messages", {"messages": []}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("n", {"n": 2}),
        ("background", {"background": True, "stream": True}),
        ("background", {"background": True, "store": False}),
        ("tools.0", {"tools": [{"type": "web_search"}]}),
        ("tools", {"tools": [TIME, TIME]}),
        ("tool_choice", {"tool_choice": {"type": "allowed_tools"}}),
        ("tool_choice", {"tools": [TIME], "tool_choice": {"type": "function", "name": "f"}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("text.format", {"text": {"format": {"type": "json_object"}}, "tools": [TIME]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_output_tokens", {"max_output_tokens": 5000}),
        ("input", {"input": []}),
        ("input", {"input": "word " * 3000}),
        ("input", {"input": [{"type": "reasoning", "id": "r", "summary": []}]}),
        ("input", {"input": [{"type": "reasoning", "encrypted_content": "x"}]}),
        ("input.0", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("input.0", {"input": [{"type": 5}]}),
        ("input.0.message.role", {"input": [{"role": "tool", "content": "x"}]}),
        (
            "input.0.message.content",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ),
        (
            "input.0.function_call",
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
        ),
    ],
)
def test_what_is_refused_is_named(router: Router, field: str, body: dict[str, Any]) -> None:
    router.say("a")
    assert refused(router.post(RESPONSES, **{"input": "Hi", **body})) == field


def test_what_asks_for_nothing_is_accepted(router: Router) -> None:
    router.say("a")
    body = {
        "include": ["reasoning.encrypted_content"],
        "previous_response_id": None,
        "truncation": "disabled",
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "stream_options": {"include_obfuscation": False},
    }
    checked(router.post(RESPONSES, input="Hi", **body))


def test_a_template_that_refuses_the_messages(text: TextModel) -> None:
    template = ChatTemplate("{{ raise_exception('no such role') }}", {})
    with routers(replace(text, chat_template=template)) as start:
        answer = start().post(RESPONSES, input="Hi")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="generates text only"):
        client.embeddings.create(model="test", input="Hi")
