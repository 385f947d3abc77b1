"""kvferry bench: streams as they come, whole, cut and broken, and the times taken of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.serving.client import Answer, AnswerError, Client, calibrated_words
from bench.serving.connection import ConnectionLostError, Endpoint
from bench.serving.load import closed_loop, open_loop
from bench.serving.prompts import TokenIds, Words
from bench.serving.record import Result
from bench.serving.sse import MAX_EVENT, SSEError, SSEParser
from bench.serving.workload import Item, Segment
from tests.bench.serving_endpoint import (
    DONE,
    FakeEndpoint,
    Script,
    event,
    serving,
    speaker,
    token,
    used,
)
from tests.stack import free_port

STREAM = (
    b'data: {"a": 1}\r\n\r\n: a comment\n\nevent: x\n'
    b"data:two\ndata: lines\n\nid: 3\n\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_stream_is_cut(size: int) -> None:
    parser = SSEParser()
    found = [e for at in range(0, len(STREAM), size) for e in parser.feed(STREAM[at : at + size])]
    assert found == EVENTS
    assert not parser.inside_event


def test_an_event_without_end_is_refused() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: abc") == []
    assert parser.inside_event
    with pytest.raises(SSEError, match="more than"):
        parser.feed(b"x" * MAX_EVENT)


@pytest.mark.parametrize(
    "body",
    [
        b"data: {not json\n\n",
        b"data: []\n\n",
        b'data: {"no": "choices"}\n\n',
        b'data: {"choices": [null]}\n\n',
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": "many"}}\n\n',
    ],
)
def test_a_malformed_event_is_an_error_of_its_own_kind(body: bytes) -> None:
    answer = Answer(status=200)
    with pytest.raises(AnswerError) as caught:
        answer.push(body, 0.0)
    assert caught.value.kind == "malformed"


def client_of(url: str, api: Any = "completions", **options: Any) -> Client:
    prompts = TokenIds(10, 20) if api == "completions" else Words()
    return Client(Endpoint(url), "fake", api, prompts, **options)


def item(output_tokens: int = 3) -> Item:
    return Item(0.0, (Segment("a", 5),), output_tokens)


async def ask(client: Client, output_tokens: int = 3) -> Result:
    now = time.perf_counter()
    request = item(output_tokens)
    result = await client.ask(0, request, client.body(request), now, now)
    client.endpoint.close()
    return result


async def test_a_whole_answer() -> None:
    with serving(FakeEndpoint(speaker(ttft=0.2, tpot=0.1))) as endpoint:
        result = await ask(client_of(endpoint.url, extra={"top_k": 4}))
    assert result.error is None
    assert (result.prompt_tokens, result.output_tokens) == (5, 3)
    for arrival, floor in zip(result.times, (0.2, 0.3, 0.4), strict=True):
        assert floor - 0.01 <= arrival < floor + 5
    (body,) = endpoint.bodies
    assert all(10 <= token_id < 20 for token_id in body["prompt"])
    assert (body["ignore_eos"], body["top_k"], body["max_tokens"]) == (True, 4, 3)


async def test_text_is_counted_and_the_opening_of_a_chat_is_not() -> None:
    with serving(FakeEndpoint(speaker())) as endpoint:
        result = await ask(client_of(endpoint.url, "chat", ignore_eos=False))
    assert len(result.times) == 3
    assert "ignore_eos" not in endpoint.bodies[0]


async def test_tokens_that_share_an_event_are_counted_by_the_endpoint() -> None:
    def script(path: str, body: dict[str, Any]) -> Sequence[tuple[float, bytes]]:
        return [(0, token(path, " two words")), (0, used(5, 4) + DONE)]

    with serving(FakeEndpoint(script)) as endpoint:
        result = await ask(client_of(endpoint.url))
    assert (len(result.times), result.output_tokens) == (1, 4)


def says(*frames: bytes) -> Script:
    return lambda path, body: [(0.0, frame) for frame in frames]


TOKEN = token("/v1/completions")
FAILURES = {
    "cut": (FakeEndpoint(says(TOKEN)), "between events"),
    "cut within": (FakeEndpoint(says(TOKEN, TOKEN[:20])), "within an event"),
    "disconnected": (FakeEndpoint(says(TOKEN), cut=True), "closed before the answer ended"),
    "error event": (FakeEndpoint(says(TOKEN, event({"error": {"message": "lost"}}))), "lost"),
    "malformed": (FakeEndpoint(says(b"data: {\n\n")), "JSONDecodeError"),
    "empty": (FakeEndpoint(says(DONE)), "no text"),
    "http 429": (FakeEndpoint(says(), status=429), "not now"),
    "http 500": (FakeEndpoint(says(), status=500), "not now"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failures_are_told_apart(name: str) -> None:
    endpoint, reason = FAILURES[name]
    with serving(endpoint):
        result = await ask(client_of(endpoint.url))
    assert result.error == name.removesuffix(" within")
    assert reason in result.message


async def test_a_slow_answer_and_a_closed_port() -> None:
    with serving(FakeEndpoint(speaker(tpot=5.0))) as endpoint:
        result = await ask(client_of(endpoint.url, timeout=0.3))
    assert (result.error, len(result.times)) == ("timeout", 1)
    result = await ask(client_of(f"http://127.0.0.1:{free_port()}"))
    assert result.error == "connect"


async def test_connections_are_used_again_and_replaced_when_the_endpoint_has_closed_them() -> None:
    with serving(FakeEndpoint(speaker())) as endpoint:
        client = client_of(endpoint.url)
        items = [item() for _ in range(6)]
        run = await closed_loop(client, items, 2, lambda: None, lambda result: None)
        assert {result.error for result in run.results} == {None}
        assert endpoint.connections == 2
        port = int(endpoint.url.rpartition(":")[2])
    again = FakeEndpoint(speaker())
    server = await asyncio.start_server(again.serve, "127.0.0.1", port)
    now = time.perf_counter()
    result = await client.ask(0, item(), client.body(item()), now, now)
    assert result.error is None
    client.endpoint.close()
    server.close()


async def test_an_answer_that_is_no_http_ends_the_connection() -> None:
    async def mumble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"what?\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(mumble, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(ConnectionLostError):
        await Endpoint(url).get("/v1/models")
    server.close()


async def test_an_answer_without_length_ends_with_its_connection() -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"data": []}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(old, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert await Endpoint(url).get("/v1/models") == (200, b'{"data": []}')
    server.close()


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    items = [replace(item(2), arrival=index / 50) for index in range(10)]
    with serving(FakeEndpoint(speaker(ttft=1.0))) as endpoint:
        client = client_of(endpoint.url)
        done: list[Result] = []
        run = await open_loop(client, items, 50.0, lambda: None, done.append)
        client.endpoint.close()
    assert [result.index for result in run.results] == list(range(10))
    assert len(done) == 10
    for result in run.results:
        assert result.scheduled == pytest.approx(result.index / 50)
        assert result.sent >= result.scheduled - 0.002
        assert result.times[0] >= 0.99
    assert max(result.sent for result in run.results) < min(r.ended for r in run.results)
    assert run.client.wall >= 1.18


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    items = [item(1) for _ in range(9)]
    with serving(FakeEndpoint(speaker(ttft=0.1))) as endpoint:
        client = client_of(endpoint.url)
        run = await closed_loop(client, items, 3, lambda: None, lambda result: None)
        client.endpoint.close()
    moments = [(r.sent, 1) for r in run.results] + [(r.ended, -1) for r in run.results]
    running = 0
    for _, change in sorted(moments):
        running += change
        assert running <= 3
    assert run.client.wall >= 0.28


async def test_texts_are_calibrated_by_the_endpoint_itself() -> None:
    with serving(FakeEndpoint(speaker(overhead=11))) as endpoint:
        client = client_of(endpoint.url, "chat")
        assert await calibrated_words(client) == Words(2.0, 11.0)
        client.endpoint.close()


def test_a_key_is_sent_and_never_written() -> None:
    async def main() -> None:
        endpoint = Endpoint(fake.url, "secret")
        await endpoint.get("/v1/models")
        endpoint.close()

    with serving(FakeEndpoint(speaker())) as fake:
        asyncio.run(main())
    assert fake.keys == ["Bearer secret"]
    assert "secret" not in json.dumps(fake.bodies)
