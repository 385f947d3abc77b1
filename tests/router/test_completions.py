"""Completions and chats through the openai package, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from protocol.errors import OverloadedError, WorkerLostError
from router.api_keys import ApiKeys
from router.generation import TokenChunk
from tests.router.conftest import HANG, MAX_MODEL_LEN, PATIENCE, Router, eventually

HELLO = "Héllo 😀, wörld"
QUESTION: list[Any] = [{"role": "user", "content": "Hi?"}]
at_once = pytest.mark.parametrize("at_once", [1, 3, 100])


@pytest.fixture
def client(router: Router) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)


@at_once
def test_completion(client: openai.OpenAI, router: Router, at_once: int) -> None:
    router.say(HELLO, at_once=at_once)
    answer = client.completions.create(model="test", prompt="Say hello")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "test")
    assert answer.system_fingerprint
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (HELLO, "stop")
    num_tokens = len(router.text.tokenizer.encode(HELLO, add_special_tokens=False).ids) + 1
    request = router.generator.requests[0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.total_tokens == num_tokens + answer.usage.prompt_tokens
    assert request.prompt_token_ids == router.text.tokenizer.encode("Say hello").ids


@at_once
def test_completion_stream(client: openai.OpenAI, router: Router, at_once: int) -> None:
    router.say(HELLO, "length", at_once=at_once)
    chunks = list(client.completions.create(model="test", prompt="Say hello", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == HELLO
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) <= len(router.generator.script)


def test_clients_that_split_lines_as_unicode_does_read_a_stream(router: Router) -> None:
    text = "one\x85two\u2028three\u2029four"
    router.say(text)
    body = {"model": "test", "prompt": "Say hello", "stream": True}
    lines = router.post("/v1/completions", **body).text.splitlines()
    *events, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_chat(client: openai.OpenAI, router: Router) -> None:
    router.say(HELLO)
    answer = client.chat.completions.create(model="test", messages=QUESTION)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", HELLO)
    prompt = router.generator.requests[0].prompt_token_ids
    assert router.text.decode(prompt) == "<|bos|><|user|>Hi?<|end|><|assistant|>"
    assert prompt[:2].count(0) == 1  # one BOS, the template's


async def test_chat_stream(router: Router) -> None:
    router.say(HELLO)
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="test",
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_a_stream_on_the_wire(router: Router) -> None:
    router.say("ab")
    answer = router.post("/v1/completions", prompt="x", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert sum('"finish_reason":"stop"' in event for event in events) == 1


def test_content_may_be_text_parts(client: openai.OpenAI, router: Router) -> None:
    router.say("ok")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="test", messages=messages)
    shown = router.text.decode(router.generator.requests[0].prompt_token_ids)
    assert shown == "<|bos|><|system|>s<|end|><|user|>one\ntwo<|end|><|assistant|>"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_request_on_the_workers(router: Router, stream: bool) -> None:
    router.say("one two three four", "length")
    answer = router.post(
        "/v1/completions", prompt="x", stop=["ee f", "zzz"], stream=stream, return_token_ids=True
    )
    lines = answer.text.replace("data: [DONE]", "").split("\n\n")
    bodies = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    choices = [body["choices"][0] for body in bodies]
    assert "".join(choice["text"] for choice in choices) == "one two thr"
    assert choices[-1]["finish_reason"] == "stop"
    assert eventually(lambda: router.generator.num_open == 0)
    assert router.generator.num_given < len(router.generator.script)
    assert sum(len(choice["token_ids"]) for choice in choices) == router.generator.num_given
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] == router.generator.num_given


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_token_ids_on_request(router: Router, path: str) -> None:
    router.say(HELLO, at_once=2)
    body = {"messages": QUESTION} if "chat" in path else {"prompt": [7, 8, 9]}
    whole = router.post(path, return_token_ids=True, **body).json()["choices"][0]
    given = [token_id for chunk in router.generator.script for token_id in chunk.token_ids]
    assert whole["token_ids"] == given
    assert whole["prompt_token_ids"] == router.generator.requests[0].prompt_token_ids
    lines = router.post(path, return_token_ids=True, stream=True, **body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if '"token_ids"' in line]
    streamed = [event["choices"][0] for event in events]
    assert [token_id for choice in streamed for token_id in choice["token_ids"]] == given
    assert streamed[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in choice for choice in streamed[1:])


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts(client: openai.OpenAI, router: Router, stream: bool) -> None:
    router.generator.scripts = lambda request: [
        *(TokenChunk([token_id]) for token_id in request.prompt_token_ids),
        TokenChunk([], "length"),
    ]
    prompts = [[74], [75, 76], [77, 78, 79]]
    answer = client.completions.create(
        model="test", prompt=prompts, stream=stream, extra_body={"stream_options": None}
    )
    texts = ["", "", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [router.text.decode(prompt) for prompt in prompts]
    assert eventually(lambda: router.generator.num_open == 0)


def test_one_failing_prompt_ends_the_others(router: Router) -> None:
    router.generator.scripts = lambda request: (
        [WorkerLostError("gone")] if request.prompt_token_ids == [9] else [TokenChunk([7]), HANG]
    )
    assert router.post("/v1/completions", prompt=[[7], [8], [9]]).status_code == 502
    assert eventually(lambda: router.generator.num_open == 0)


def test_sampling_defaults(router: Router) -> None:
    router.say("a")
    router.post("/v1/completions", prompt="x")
    router.post("/v1/chat/completions", messages=QUESTION)
    first, second = (request.sampling for request in router.generator.requests)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (16, 1.0, 1.0, 0)
    assert first.stop_token_ids == router.text.eos_token_ids
    assert first.seed != second.seed
    num_prompt = len(router.generator.requests[1].prompt_token_ids)
    assert second.max_tokens == MAX_MODEL_LEN - num_prompt


def test_sampling_options_reach_the_workers(router: Router) -> None:
    router.say("a")
    options = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.25,
        "min_tokens": 2,
        "max_tokens": 5,
    }
    extra = {"seed": -1, "ignore_eos": True, "stop_token_ids": [9, 9, 8], "user": "me", "zzz": 1}
    assert router.post("/v1/completions", prompt="x", **options, **extra).status_code == 200
    sampling = router.generator.requests[0].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert sampling.seed == 2**64 - 1
    assert sampling.stop_token_ids == (9, 8)


def test_null_means_absent(router: Router) -> None:
    router.say("a")
    nulls = ("temperature", "stop", "n", "logprobs", "tools", "stream", "max_tokens", "seed")
    answer = router.post("/v1/completions", prompt="x", **dict.fromkeys(nulls))
    assert answer.status_code == 200
    assert router.generator.requests[0].sampling.temperature == 1.0


def test_the_output_is_cut_to_the_context_unless_asked_for(router: Router) -> None:
    router.say("a")
    prompt = [7] * (MAX_MODEL_LEN - 3)
    assert router.post("/v1/completions", prompt=prompt).status_code == 200
    assert router.generator.requests[0].sampling.max_tokens == 3
    assert router.post("/v1/completions", prompt=prompt, max_tokens=3).status_code == 200
    refused = router.post("/v1/completions", prompt=prompt, max_tokens=4)
    assert refused.status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_any_token_has_its_status(router: Router, stream: bool) -> None:
    router.generator.script = [OverloadedError("too much", retry_after=2.4)]
    answer = router.post("/v1/completions", prompt="x", stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_an_error_within_a_stream_is_its_last_event(client: openai.OpenAI, router: Router) -> None:
    router.generator.script = [TokenChunk([77]), WorkerLostError("decode-1 died")]
    lines = router.post("/v1/completions", prompt="x", stream=True).text.strip().split("\n\n")
    assert len(lines) == 2
    assert '"code":"worker_lost"' in lines[1]
    with pytest.raises(openai.APIError, match="decode-1 died"):
        list(client.completions.create(model="test", prompt="x", stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_shows_no_trace(router: Router, stream: bool) -> None:
    router.generator.script = [RuntimeError("secret")]
    answer = router.post("/v1/completions", prompt="x", stream=stream)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_a_bug_within_a_stream_is_an_error_event(router: Router) -> None:
    router.generator.script = [TokenChunk([77]), RuntimeError("secret")]
    text = ""
    with httpx.stream(
        "POST",
        f"{router.url}/v1/completions",
        json={"prompt": "x", "stream": True},
        timeout=PATIENCE,
    ) as answer:
        for part in answer.iter_text():
            text += part
    assert text.strip().split("\n\n")[-1].startswith('data: {"error"')
    assert "secret" not in text
    assert eventually(lambda: router.metrics()["kvferry_http_errors_total internal_error 500"] == 1)


def test_an_output_that_just_ends_is_an_error(router: Router) -> None:
    router.generator.script = [TokenChunk([77])]
    assert router.post("/v1/completions", prompt="x").status_code == 500


async def test_many_at_once(router: Router) -> None:
    router.generator.scripts = lambda request: [
        *(TokenChunk([token_id]) for token_id in request.prompt_token_ids[1:]),
        TokenChunk([1], "stop"),
    ]
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none") as client:

        async def echo(text: str) -> str:
            stream = await client.completions.create(model="test", prompt=text, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = [f"{number} ist größer als {number - 1} 😀" for number in range(50)]
        assert await asyncio.gather(*map(echo, texts)) == texts


def test_metrics(router: Router) -> None:
    router.say("one two three")
    num_tokens = len(router.generator.script)
    router.post("/v1/completions", prompt=[5, 6, 7])
    router.post("/v1/completions", prompt=[5, 6, 7], stream=True)
    router.post("/v1/completions", prompt="x", temperature=9)
    metrics = router.metrics()
    assert metrics["kvferry_prompt_tokens_total"] == 6
    assert metrics["kvferry_generation_tokens_total"] == 2 * num_tokens
    assert metrics["kvferry_request_success_total stop"] == 2
    assert metrics["kvferry_time_to_first_token_seconds_count"] == 2
    assert metrics["kvferry_inter_token_latency_seconds_count"] == 2 * (num_tokens - 1)
    assert metrics["kvferry_request_time_per_output_token_seconds_count"] == 2
    means = metrics["kvferry_request_time_per_output_token_seconds_sum"]
    between = metrics["kvferry_inter_token_latency_seconds_sum"]
    assert between == pytest.approx(means * (num_tokens - 1))
    assert 0 < between < metrics["kvferry_e2e_request_latency_seconds_sum"]
    assert metrics["kvferry_e2e_request_latency_seconds_count"] == 2
    assert metrics["kvferry_http_errors_total invalid_request 400"] == 1
    assert metrics["kvferry_num_requests_running"] == 0


def test_models_and_health(client: openai.OpenAI, router: Router) -> None:
    assert [model.id for model in client.models.list()] == ["test"]
    assert client.models.retrieve("test").owned_by == "kvferry"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    assert httpx.get(router.url + "/health").status_code == 200
    assert httpx.get(router.url + "/ready").json() == {
        "ready": True,
        "reason": None,
        "colocated": False,
    }
    assert httpx.get(router.url + "/admin/workers").json() == {
        "workers": router.generator.workers()
    }


def test_drain_names_the_worker_or_that_there_is_none(router: Router) -> None:
    answer = router.post("/admin/workers/p/drain")
    assert (answer.status_code, answer.json()["state"]) == (200, "leaving")
    answer = router.post("/admin/workers/a%2Fb/drain")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "worker_not_found"
    assert "'a/b'" in answer.json()["error"]["message"]


def test_without_workers(router: Router) -> None:
    router.generator.max_model_len = 0
    router.generator.reason = "no prefill worker"
    answer = httpx.get(router.url + "/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no prefill worker")
    answer = router.post("/v1/completions", prompt="x")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "no prefill worker"
    assert httpx.get(router.url + "/health").status_code == 200


def test_tokenize_and_back(router: Router) -> None:
    answer = router.post("/tokenize", prompt=HELLO).json()
    assert answer["tokens"] == router.text.tokenizer.encode(HELLO).ids
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == MAX_MODEL_LEN
    bare = router.post("/tokenize", prompt=HELLO, add_special_tokens=False).json()["tokens"]
    assert bare == answer["tokens"][1:]
    assert router.post("/detokenize", tokens=bare).json() == {"prompt": HELLO}
    chat = router.post("/tokenize", messages=QUESTION, add_generation_prompt=False).json()
    assert router.text.decode(chat["tokens"]) == "<|bos|><|user|>Hi?<|end|>"


def test_an_api_key_is_required(start: Callable[..., Router]) -> None:
    router = start(api_keys=ApiKeys(["other", "s3cret-ü"]))
    router.say("a")
    for path in ("/v1/models", "/admin/workers"):
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret-ü".encode()},
        ):
            answer = httpx.get(router.url + path, headers=given)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    key = {"Authorization": "Bearer s3cret-ü".encode()}
    assert httpx.get(router.url + "/v1/models", headers=key).status_code == 200
    assert router.post("/v1/completions", prompt="x").status_code == 401
    assert router.post("/admin/workers/p/drain").status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(router.url + path).status_code == 200
