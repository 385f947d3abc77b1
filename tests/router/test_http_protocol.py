"""Before a body: bounds on a request's head, and when its first byte came."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from router import http_protocol
from router.generation import GenerationRequest, TokenChunk
from tests.router.conftest import PATIENCE, Router


def exchange(router: Router, sent: bytes) -> bytes:
    """What the router says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", router.port), PATIENCE) as connection:
        connection.sendall(sent)
        said = b""
        try:
            while part := connection.recv(65_536):
                said += part
        except ConnectionResetError:  # it closed with bytes of ours unread
            pass
        return said


@pytest.mark.parametrize(
    "part", [b"GET /" + b"x" * 300_000, b"GET / HTTP/1.1\r\nA: " + b"x" * 300_000]
)
def test_an_endless_head_is_cut(router: Router, part: bytes) -> None:
    assert exchange(router, part).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"]
)
def test_a_head_that_does_not_arrive(
    start: Callable[..., Router], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.3)
    said = exchange(start(), sent)
    assert b"HTTP/1.1 408 " in said
    assert (b"HTTP/1.1 200 " in said) == (b"\r\n\r\n" in sent)


def test_a_request_begins_with_its_first_byte(router: Router) -> None:
    router.say("Hi")
    body = json.dumps({"model": "test", "prompt": "Some", "max_tokens": 9}).encode()
    with socket.create_connection(("127.0.0.1", router.port), PATIENCE) as connection:
        for part in (b"POST /v1/completions HTTP/1.1\r\n", b"Connection: close\r\n"):
            connection.sendall(part)
            time.sleep(0.1)
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
        time.sleep(0.1)
        connection.sendall(body)
        while connection.recv(65_536):
            pass
    [row] = httpx.get(f"{router.url}/admin/requests", timeout=PATIENCE).json()["recent"]
    found = httpx.get(f"{router.url}/admin/requests/{row['id']}", timeout=PATIENCE).json()
    first = found["sequences"][0]["stages"][0]
    assert (first["name"], first["start"]) == ("receive", 0.0)
    assert first["seconds"] >= 0.25


def test_a_request_has_come_though_the_router_is_too_busy_to_read_it(router: Router) -> None:
    busy = threading.Event()

    def script(_: GenerationRequest) -> list[TokenChunk]:
        if not busy.is_set():
            busy.set()
            time.sleep(2.0)  # on the event loop
        return [TokenChunk([5], "length")]

    router.generator.scripts = script
    ask = partial(router.post, "/v1/completions", model="test", prompt="Hello")
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(ask)
        assert busy.wait(PATIENCE)
        answer = ask().json()
        other.result()
    found = httpx.get(f"{router.url}/admin/requests/{answer['id']}", timeout=PATIENCE).json()
    stage = found["sequences"][0]["stages"][0]
    assert stage["name"] == "receive"
    assert 0.25 < stage["seconds"] < PATIENCE
