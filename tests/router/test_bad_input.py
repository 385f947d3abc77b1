"""Every bad request gets an OpenAI error with the right status, and no worker hears of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from router.text import TextModel
from tests.router.conftest import MAX_MODEL_LEN, PATIENCE, Router, eventually, routers

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def shared(text: TextModel) -> Iterator[Router]:
    with routers(text) as start:
        yield start()


@pytest.fixture
def router(shared: Router) -> Router:
    """One for all: what is refused leaves no trace in it."""
    shared.generator.requests.clear()
    return shared


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in answer.text
    content: dict[str, Any] = body["error"]
    return content


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": [1, "a"]}),
        ("prompt", {"prompt": [1.0]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": ["a"] * 129}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [4096]}),
        ("prompt", {"prompt": [10**30]}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": "5"}),
        ("max_tokens", {"max_tokens": 5.5}),
        ("max_tokens", {"max_tokens": True}),
        ("max_tokens", {"max_tokens": 10**30}),
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("min_tokens", {"min_tokens": -1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 2}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("frequency_penalty", {"frequency_penalty": float("inf")}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": 1.5}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["a", ""]}),
        ("stop", {"stop": 5}),
        ("stop", {"stop": ["a"] * 5}),
        ("stop_token_ids", {"stop_token_ids": [4096]}),
        ("stop_token_ids.0", {"stop_token_ids": ["a"]}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("model", {"model": 5}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("n", {"n": 65, "prompt": ["a", "b"]}),
        ("best_of", {"best_of": 65, "prompt": ["a", "b"]}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("max_tokens", {"max_tokens": -1, "echo": True}),
        ("max_completion_tokens", {"max_completion_tokens": 3}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("echo", {"echo": 1}),
        ("suffix", {"suffix": "end"}),
        ("priority", {"priority": 2**31}),
        ("priority", {"priority": 1.5}),
        ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("cache_salt", {"cache_salt": "x" * 257}),
        ("logit_bias", {"logit_bias": {"4096": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"a": 1}}),
        ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
        ("logit_bias.5", {"logit_bias": {"5": 100.5}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("guided_json", {"guided_json": {"type": "nothing"}}),
        ("guided_json", {"guided_json": "{"}),
        ("guided_json", {"guided_json": {"not": {}}}),
        ("guided_regex", {"guided_regex": "("}),
        ("guided_choice", {"guided_choice": []}),
        ("guided_grammar", {"guided_grammar": "begin: :"}),
        ("guided_choice", {"guided_choice": ["a"], "guided_regex": "a"}),
        ("ignore_eos", {"ignore_eos": True, "guided_regex": "a"}),
        ("structured_outputs", {"structured_outputs": {}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "{}"}}),
    ],
)
def test_bad_completions(router: Router, param: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "x", **fields})
    answer = httpx.post(router.url + TEXT, content=body, timeout=PATIENCE)
    content = error(answer, 400)
    assert content["param"] == param
    assert content["type"] == "invalid_request_error"
    assert param in content["message"]
    assert router.generator.requests == []


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "hello"}),
        ("messages.0", {"messages": ["hello"]}),
        ("messages.0.role", {"messages": [{"content": "x"}]}),
        ("messages.content", {"messages": [{"role": "user"}]}),
        ("messages.content", {"messages": [{"role": "tool", "content": None}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": []}]}),
        (
            "messages.1.content",
            {
                "messages": [
                    {"role": "system", "content": "x"},
                    {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
                ]
            },
        ),
        (
            "messages.0.tool_calls.0.function",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        ),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 10**6}),
        ("tools.0.function", {"tools": [{"type": "function"}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("functions", {"functions": [{}]}),
        ("logprobs", {"logprobs": 1}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("echo", {"echo": True}),
        ("n", {"n": 129}),
        ("modalities", {"modalities": ["text", "audio"]}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {}}},
        ),
    ],
)
def test_bad_chats(router: Router, param: str, fields: dict[str, Any]) -> None:
    answer = router.post(CHAT, **{"messages": [{"role": "user", "content": "x"}], **fields})
    assert error(answer, 400)["param"] == param
    assert router.generator.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "suffix": ""},
        {"tools": [], "response_format": {"type": "text"}, "top_logprobs": 0},
        {"prompt": ["x"], "model": "test", "stop": []},
    ],
)
def test_neutral_values_are_accepted(router: Router, fields: dict[str, Any]) -> None:
    router.say("a")
    assert router.post(TEXT, **{"prompt": "x", **fields}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "x"',
        b'{"prompt": "x"} x',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"prompt=x",
    ],
)
@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_objects(router: Router, path: str, raw: bytes) -> None:
    error(httpx.post(router.url + path, content=raw, timeout=PATIENCE), 400)


def test_unknown_model(router: Router) -> None:
    for path, fields in (
        (TEXT, {"prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        content = error(router.post(path, model="gpt-5", **fields), 404)
        assert (content["code"], content["param"]) == ("model_not_found", "model")


def test_a_long_prompt_says_both_numbers(router: Router) -> None:
    content = error(router.post(TEXT, prompt=[7] * 300), 400)
    assert content["code"] == "context_length_exceeded"
    assert "300" in content["message"]
    assert str(MAX_MODEL_LEN) in content["message"]
    assert content["param"] == "prompt"
    error(router.post(TEXT, prompt=[7] * MAX_MODEL_LEN), 400)
    messages = [{"role": "user", "content": "word " * 300}]
    assert error(router.post(CHAT, messages=messages), 400)["param"] == "messages"
    content = error(router.post(TEXT, prompt=[7] * 6, max_tokens=251), 400)
    assert (content["code"], content["param"]) == ("context_length_exceeded", "max_tokens")
    assert {"251", "6", str(MAX_MODEL_LEN)} <= set(content["message"].split())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": 5},
        {"messages": []},
    ],
)
def test_bad_tokenize(router: Router, fields: dict[str, Any]) -> None:
    error(router.post("/tokenize", **fields), 400)


@pytest.mark.parametrize("tokens", [None, "x", [4096], [-1], [1.5]])
def test_bad_detokenize(router: Router, tokens: object) -> None:
    error(router.post("/detokenize", tokens=tokens), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", TEXT + "/", 404),
    ],
)
def test_unknown_routes(router: Router, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, router.url + path, timeout=PATIENCE)
    assert path in error(answer, status)["message"]


def test_a_large_body(start: Callable[..., Router]) -> None:
    router = start(max_body_bytes=1000)
    router.say("a")
    small = json.dumps({"prompt": "x"}).ljust(1000)
    assert httpx.post(router.url + TEXT, content=small).status_code == 200
    answer = httpx.post(router.url + TEXT, content=small + " ", timeout=PATIENCE)
    assert "1000" in error(answer, 413)["message"]

    def parts() -> Iterator[bytes]:  # sent chunked, without a content-length
        for _ in range(1000):
            yield b" " * 1000

    error(httpx.post(router.url + TEXT, content=parts(), timeout=PATIENCE), 413)
    assert len(router.generator.requests) == 1


def test_a_body_declared_too_large_is_not_waited_for(router: Router) -> None:
    with socket.create_connection(("127.0.0.1", router.port), timeout=PATIENCE) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"
        client.sendall(head)
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive(start: Callable[..., Router]) -> None:
    router = start(body_timeout=0.2)
    with socket.create_connection(("127.0.0.1", router.port), timeout=PATIENCE) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_within_its_body(router: Router) -> None:
    with socket.create_connection(("127.0.0.1", router.port), timeout=PATIENCE) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    router.say("a")
    assert router.post(TEXT, prompt="x").status_code == 200
    assert len(router.generator.requests) == 1
    assert eventually(
        lambda: "kvferry_http_errors_total client_closed_request 499" in router.metrics()
    )


def test_what_is_not_http(router: Router) -> None:
    with socket.create_connection(("127.0.0.1", router.port), timeout=PATIENCE) as client:
        client.sendall(b"\x16\x03\x01\x00\xff garbage\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_template_variables(router: Router) -> None:
    messages = [{"role": "user", "content": "x"}]
    content = error(router.post(CHAT, messages=messages, chat_template_kwargs=5), 400)
    assert content["param"] == "chat_template_kwargs"
    router.say("a")
    options = {"chat_template_kwargs": {"bos_token": "B"}, "add_generation_prompt": False}
    assert router.post(CHAT, messages=messages * 200, **options).status_code == 400
    assert router.post(CHAT, messages=messages, **options).status_code == 200
    shown = router.text.decode(router.generator.requests[0].prompt_token_ids)
    assert shown == "B<|user|>x<|end|>"
