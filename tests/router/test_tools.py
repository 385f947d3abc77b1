"""Tools over HTTP, as the openai package sends and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from protocol.grammar import check
from router.chat_template import ChatTemplate
from router.generation import TokenChunk
from router.text import TextModel
from router.tool_formats import FORMATS
from tests.router.conftest import MODEL, Router, routers

CHAT = "/v1/chat/completions"
QUESTION: list[Any] = [{"role": "user", "content": "Weather?"}]
TEMPLATE = "{{ messages | tojson }}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Now", "parameters": SCHEMA, "strict": True},
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
NAMED = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "time", "arguments": {"a": 1}\n</tool_call>'


@pytest.fixture(scope="module")
def shared(text: TextModel) -> Iterator[Router]:
    template = ChatTemplate(TEMPLATE, {})
    with routers(replace(text, chat_template=template, tool_format=FORMATS["hermes"])) as start:
        yield start()


@pytest.fixture
def router(shared: Router) -> Router:
    shared.generator.requests.clear()
    shared.say("Hello")
    return shared


@pytest.fixture
def client(router: Router) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)


def whole(client: openai.OpenAI, **body: Any) -> Any:
    ask: dict[str, Any] = {"messages": QUESTION, "tools": [WEATHER, TIME], **body}
    answer = client.chat.completions.create(model="test", **ask)
    ChatCompletion.model_validate(answer.model_dump())
    return answer.choices[0]


def streamed(client: openai.OpenAI, **body: Any) -> tuple[str, list[list[str]], str | None]:
    """Content, names and arguments of the calls, finish reason."""
    ask: dict[str, Any] = {"messages": QUESTION, "tools": [WEATHER, TIME], **body}
    content, calls, reason, ids = "", [], None, set()
    for chunk in client.chat.completions.create(model="test", stream=True, **ask):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert (call.index, call.type) == (len(calls), "function")
                ids.add(call.id)
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
    assert len(ids) == len(calls)
    return content, calls, reason


def prompt(router: Router) -> str:
    return router.text.decode(router.generator.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("at_once", [1, 3, 500])
def test_calls_beside_content(router: Router, client: openai.OpenAI, at_once: int) -> None:
    router.say(f"I look.\n{CALL}\n{SECOND}", at_once=at_once)
    expected = [["weather", '{"city": "Zürich"}'], ["time", "{}"]]
    choice = whole(client)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [[call.function.name, call.function.arguments] for call in calls] == expected
    assert len({call.id for call in calls}) == 2
    assert all(call.id.isalnum() and len(call.id) == 9 for call in calls)
    assert streamed(client) == ("I look.", expected, "tool_calls")


def test_a_call_alone_has_no_content(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL)
    assert whole(client).message.content is None


def test_arguments_come_in_pieces(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL)
    stream = client.chat.completions.create(
        model="test", messages=QUESTION, tools=[WEATHER], stream=True
    )
    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert len(deltas) > 5


def test_a_malformed_call_is_content(router: Router, client: openai.OpenAI) -> None:
    router.say(f"Look: {BROKEN}", at_once=2)
    choice = whole(client)
    assert choice.message.content == f"Look: {BROKEN}"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    content, _, reason = streamed(client)
    assert (content, reason) == (choice.message.content, "stop")


def test_a_call_cut_short_is_content(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL[:40], "length")
    choice = whole(client)
    assert (choice.message.content, choice.finish_reason) == (CALL[:40], "length")


@pytest.mark.parametrize("body", [{"parallel_tool_calls": False}, {"tool_choice": NAMED}])
def test_the_only_call_ends_the_output(
    router: Router, client: openai.OpenAI, body: dict[str, Any]
) -> None:
    router.say(f"{CALL}\n{SECOND}", at_once=500)
    expected = [["weather", '{"city": "Zürich"}']]
    assert streamed(client, **body) == ("", expected, "tool_calls")
    router.say(f"{CALL}\n{SECOND}")
    router.generator.num_given = 0
    assert len(whole(client, **body).message.tool_calls) == 1
    assert router.generator.num_given < len(router.generator.script)


def test_each_choice_has_its_own_calls(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL)
    answer = client.chat.completions.create(
        model="test", messages=QUESTION, tools=[WEATHER], n=2, logprobs=True
    )
    ids = {call.id for choice in answer.choices for call in choice.message.tool_calls or []}
    assert len(ids) == 2


def test_the_template_gets_tools_calls_and_results(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL)
    message = whole(client).message
    turns = [*QUESTION, message, {"role": "tool", "tool_call_id": "c", "content": "Sun"}]
    router.say("Sun")
    choice = whole(client, messages=turns)
    assert (choice.message.content, choice.finish_reason) == ("Sun", "stop")
    messages, tools = (json.loads(part) for part in prompt(router).split("<tool_call>"))
    assert tools == [WEATHER, TIME]
    called = messages[1]
    assert called["content"] == ""
    [call] = called["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Zürich"}}
    assert messages[2] == {"role": "tool", "tool_call_id": "c", "content": "Sun"}


def test_tools_count_in_tokenize(router: Router) -> None:
    ask = {"messages": QUESTION, "tools": [WEATHER]}
    router.post(CHAT, **ask)
    ids = router.generator.requests[-1].prompt_token_ids
    assert router.post("/tokenize", **ask).json()["tokens"] == ids


def test_none_offers_nothing(router: Router, client: openai.OpenAI) -> None:
    router.say(CALL)
    choice = whole(client, tool_choice="none", response_format={"type": "json_object"})
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
    assert "<tool_call>" not in prompt(router)


@pytest.mark.parametrize(
    ("body", "functions", "many"),
    [
        ({}, None, None),
        ({"tool_choice": "auto"}, None, None),
        ({"tool_choice": "required"}, ["weather", "time"], True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["weather", "time"], False),
        ({"tool_choice": NAMED}, ["time"], False),
    ],
)
def test_what_must_be_called_is_a_grammar(
    router: Router,
    client: openai.OpenAI,
    body: dict[str, Any],
    functions: list[str] | None,
    many: bool | None,
) -> None:
    whole(client, **body)
    grammar = router.generator.requests[-1].sampling.grammar
    if functions is None:
        assert grammar is None
        return
    assert grammar is not None
    check(grammar)
    known = [name for name in ("weather", "time") if f'\\"{name}\\"' in grammar.text]
    assert known == functions
    assert ("*" in grammar.text) == many


def test_an_opening_that_is_a_special_token_is_seen(text: TextModel) -> None:
    form = replace(FORMATS["mistral"], opening="<|user|>")
    template = ChatTemplate(TEMPLATE, {})
    with routers(replace(text, chat_template=template, tool_format=form)) as start:
        router = start()
        ids = text.tokenizer.encode(
            '[{"name": "time", "arguments": {}}]', add_special_tokens=False
        ).ids
        token_id = text.special_token_id("<|user|>")
        assert token_id is not None
        router.generator.script = [TokenChunk([token_id, *ids, text.eos_token_ids[0]], "stop")]
        ask = {"messages": QUESTION, "tools": [TIME], "tool_choice": "required"}
        message = router.post(CHAT, **ask).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
        grammar = router.generator.requests[-1].sampling.grammar
        assert grammar is not None
        assert f"<[{token_id}]>" in grammar.text


def calling(arguments: str, role: str = "assistant") -> dict[str, Any]:
    function = {"name": "time", "arguments": arguments}
    return {"messages": [{"role": role, "content": None, "tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": [TIME, TIME]}),
        ("tools", {"tools": [{**TIME} | {"function": {"name": str(i)}} for i in range(129)]}),
        ("tools.0.type", {"tools": [{**TIME, "type": "custom"}]}),
        ("tools.0.function.name", {"tools": [{**TIME, "function": {"name": ""}}]}),
        (
            "tools.0.function",
            {"tools": [{**TIME, "function": {"name": "f", "parameters": {"type": "string"}}}]},
        ),
        (
            "tools",
            {
                "tool_choice": "required",
                "tools": [{**TIME, "function": {"name": "f", "parameters": {"not": {}}}}],
            },
        ),
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": {"type": "function"}}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
        ("ignore_eos", {"ignore_eos": True, "tool_choice": "required"}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("guided_regex", {"guided_regex": "a", "tool_choice": "required"}),
        ("functions", {"functions": [{}]}),
        ("function_call", {"function_call": "auto"}),
        ("messages.0.tool_calls.0.function", calling("[]")),
        ("messages.0.tool_calls.0.function", calling("{")),
        ("messages.0.tool_calls.0.function", calling("[" * 100_000)),
        ("messages.tool_calls", calling("{}", "user")),
        ("messages.content", {"messages": [{"role": "assistant", "content": None}]}),
    ],
)
def test_bad_tools(router: Router, param: str, body: dict[str, Any]) -> None:
    answer = router.post(CHAT, **{"messages": QUESTION, "tools": [TIME], **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert router.generator.requests == []


@pytest.mark.parametrize("tool_format", [None, FORMATS["hermes"]])
def test_a_model_that_takes_no_tools_refuses_them(text: TextModel, tool_format: Any) -> None:
    source = TEMPLATE if tool_format is None else "{{ messages | tojson }}"
    model = replace(text, chat_template=ChatTemplate(source, {}), tool_format=tool_format)
    with routers(model) as start:
        router = start()
        router.say("Hello")
        answer = router.post(CHAT, messages=QUESTION, tools=[TIME])
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "tools"
        answer = router.post(CHAT, messages=QUESTION, tools=[TIME], tool_choice="none")
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("parser", "tool_format"),
    [("auto", "hermes"), ("none", None), ("llama3_json", "llama3_json"), ("mistral", "mistral")],
)
def test_the_option_names_the_format(tmp_path: Path, parser: str, tool_format: str | None) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    expected = None if tool_format is None else FORMATS[tool_format]
    assert TextModel.load(tmp_path, parser).tool_format == expected
