"""A client that goes away frees its request, wherever the request is."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

from router.generation import TokenChunk
from tests.router.conftest import HANG, PATIENCE, Router, eventually


def send(router: Router, **fields: object) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", router.port), timeout=PATIENCE)
    body = json.dumps({"prompt": "x", **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens_before", [0, 1])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_a_client_that_leaves(
    router: Router, stream: bool, tokens_before: int, prompt: object
) -> None:
    router.generator.script = [*[TokenChunk([77])] * tokens_before, HANG]
    count = 1 if prompt == "x" else 2
    client = send(router, prompt=prompt, stream=stream)
    assert eventually(lambda: router.generator.num_open == count)
    assert eventually(lambda: router.generator.num_given == tokens_before * count)
    if stream and tokens_before:
        assert b"data: " in client.recv(10_000)
    assert router.generator.num_open == count
    client.close()
    assert eventually(lambda: router.generator.num_open == 0)
    metrics = router.metrics()
    assert metrics["kvferry_num_requests_running"] == 0
    assert metrics["kvferry_http_errors_total client_closed_request 499"] == 1
    assert "kvferry_http_errors_total internal_error 500" not in metrics


def test_a_client_that_stops_reading_is_not_fed(router: Router) -> None:
    router.generator.script = [TokenChunk([77])] * 300_000
    client = send(router, stream=True)
    assert eventually(lambda: router.generator.num_given > 0)
    given = -1
    while given != router.generator.num_given:  # until the sockets' buffers are full
        given = router.generator.num_given
        time.sleep(0.5)
    assert given < 300_000
    client.close()
    assert eventually(lambda: router.generator.num_open == 0)


def test_a_connection_serves_one_request_after_the_other(router: Router) -> None:
    router.say("ab")
    with httpx.Client(base_url=router.url, timeout=PATIENCE) as client:
        for stream in (True, False, True):
            answer = client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert answer.status_code == 200
            assert "finish_reason" in answer.text


def test_a_long_prompt_does_not_hold_up_the_others(router: Router) -> None:
    router.say("a")
    long = threading.Thread(
        target=router.post, args=("/tokenize",), kwargs={"prompt": "ab " * 10**6}
    )
    long.start()
    answered = 0
    while long.is_alive():
        answered += httpx.get(router.url + "/health", timeout=PATIENCE).status_code == 200
    assert answered > 5
