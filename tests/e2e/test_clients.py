"""Real clients against real processes: the openai package, curl, and one that hangs up."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import httpx
import openai
import pytest

from tests.stack import IDLE, Stack, eventually, scrape

QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture
def client(demo: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)


def test_chat_is_readable_and_repeatable(client: openai.OpenAI, demo: Stack) -> None:
    answers = [
        client.chat.completions.create(model="test", messages=QUESTION, temperature=0)
        for _ in range(2)
    ]
    text = answers[0].choices[0].message.content
    assert text == answers[1].choices[0].message.content
    assert "path" in text.lower()
    assert answers[0].choices[0].finish_reason == "stop"
    usage = answers[0].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    demo.assert_idle()


def test_a_stream_gives_the_same_text_and_usage(client: openai.OpenAI, demo: Stack) -> None:
    whole = client.chat.completions.create(
        model="test", messages=QUESTION, temperature=0.8, seed=3, max_tokens=40
    )
    stream = client.chat.completions.create(
        model="test",
        messages=QUESTION,
        temperature=0.8,
        seed=3,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert reasons.count(None) == len(reasons) - 1
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1
    demo.assert_idle()


def test_a_response_is_the_chats_answer(client: openai.OpenAI, demo: Stack) -> None:
    options = {"model": "test", "temperature": 0.8, "extra_body": {"seed": 3}}
    question = [{"role": "user", "content": "What does os.path.join do? " * 4}]  # some blocks
    chat = client.chat.completions.create(messages=question, max_tokens=40, **options)
    whole = client.responses.create(input=question, max_output_tokens=40, **options)
    assert whole.output_text == chat.choices[0].message.content
    with client.responses.stream(input=question, max_output_tokens=40, **options) as stream:
        last = list(stream)[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    assert last.response.usage.output_tokens == chat.usage.completion_tokens
    assert last.response.usage.input_tokens == chat.usage.prompt_tokens
    assert 0 < last.response.usage.input_tokens_details.cached_tokens < chat.usage.prompt_tokens
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    long = {"max_output_tokens": 1500, "background": True}
    begun = client.responses.create(
        model="test", input=QUESTION, extra_body={"ignore_eos": True}, **long
    )
    assert begun.status == "in_progress"
    assert client.responses.cancel(begun.id).status == "cancelled"
    demo.assert_idle()


async def test_many_async_streams_at_once(demo: Stack) -> None:
    client = openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)

    async def one(number: int) -> str:
        stream = await client.completions.create(
            model="test",
            prompt=f"Return the {number}th",
            max_tokens=24,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async with client:
        together = await asyncio.gather(*(one(number) for number in range(12)))
        assert [await one(number) for number in range(3)] == together[:3]
    demo.assert_idle()


def test_stop_strings_and_token_ids(client: openai.OpenAI, demo: Stack) -> None:
    options = {"model": "test", "prompt": "Return the", "temperature": 0, "max_tokens": 30}
    extra = {"ignore_eos": True}
    whole = client.completions.create(**options, extra_body=extra).choices[0].text
    stop = whole[12:15]
    cut = client.completions.create(**options, stop=stop, extra_body=extra)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    demo.assert_idle()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(demo: Stack) -> None:
    body = {"model": "test", "messages": QUESTION, "stream": True, "temperature": 0}
    command = ["curl", "--no-buffer", "--silent", "--max-time", "120", "--data", json.dumps(body)]
    command += ["--header", "Content-Type: application/json"]
    answer = subprocess.run(
        [*command, f"{demo.url}/v1/chat/completions"], capture_output=True, text=True, check=True
    )
    events = [line.removeprefix("data: ") for line in answer.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    first = json.loads(events[0])
    assert first["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_both_workers(demo: Stack, stream: bool) -> None:
    body = {
        "model": "test",
        "prompt": "def",
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": stream,
    }
    before = demo.metrics("decode")["kvferry_generation_tokens_total"]

    def running() -> bool:
        return demo.metrics("decode")["kvferry_num_requests_running"] == 1

    if stream:
        with httpx.stream("POST", f"{demo.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert eventually(running, 60)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{demo.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=1.5))
    demo.assert_idle()
    assert demo.metrics("decode")["kvferry_generation_tokens_total"] - before < 1899


def test_load_spreads_over_the_workers(demo: Stack) -> None:
    async def burst() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"model": "test", "prompt": "import", "max_tokens": 60, "ignore_eos": True}
            url = f"{demo.url}/v1/completions"
            answers = await asyncio.gather(*(client.post(url, json=body) for _ in range(8)))
            assert all(answer.status_code == 200 for answer in answers)

    name = "kvferry_generation_tokens_total"

    def generated() -> dict[str, float]:
        return {w["id"]: scrape(w["metrics"], demo.client)[name] for w in demo.workers()}

    before = generated()
    asyncio.run(burst())
    after = generated()
    assert all(after[worker] > before[worker] for worker in after), (before, after)
    assert eventually(lambda: demo.workers()[0]["requests"] == 0, IDLE)
