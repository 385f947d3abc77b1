"""Streamed completions that are read while a test does something to the workers."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.stack import Stack, eventually

SOON = 60.0  # seconds, generous: the cores are shared
NEW = 700  # tokens of a stream


@dataclass(eq=False)
class Stream:
    """One streamed completion, as it comes."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    def take(self, event: str) -> None:
        """Note one server-sent event."""
        if event == "[DONE]":
            return
        content = json.loads(event)
        if "error" in content:
            self.error = content["error"]
        elif content["choices"]:
            [choice] = content["choices"]
            self.token_ids += choice["token_ids"]
            self.text += choice["text"]
            self.finish_reasons += [r for r in [choice["finish_reason"]] if r is not None]
        else:
            self.usage = content["usage"]

    def check(self, request: dict[str, Any]) -> None:
        """It ended once, well, and the counts are right."""
        assert self.error is None
        assert len(self.finish_reasons) == 1
        assert self.usage["prompt_tokens"] == len(request["prompt"])
        assert self.usage["completion_tokens"] == len(self.token_ids)


class Streams:
    """Several completions at the same time, each read on a thread."""

    def __init__(self, stack: Stack, requests: list[dict[str, Any]]) -> None:
        self._stack = stack
        self._requests = requests
        self.streams = [Stream() for _ in requests]
        self._threads = ThreadPoolExecutor(len(requests))
        self._ends: list[Future[None]] = [
            self._threads.submit(self._read, stream, request)
            for stream, request in zip(self.streams, requests, strict=True)
        ]

    def _read(self, stream: Stream, request: dict[str, Any]) -> None:
        body = {
            "model": "test",
            "max_tokens": NEW,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request,
        }
        with self._stack.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line:
                    stream.take(line.removeprefix("data: "))

    def wait_for(self, count: int) -> None:
        """Until every stream has so many tokens."""
        assert eventually(lambda: all(len(s.token_ids) >= count for s in self.streams), SOON)
        assert not any(end.done() for end in self._ends), "too late: a stream has ended already"

    def join(self) -> list[list[int]]:
        """All tokens, when every stream has ended well."""
        for end in self._ends:
            end.result(SOON)
        self._threads.shutdown()
        for stream, request in zip(self.streams, self._requests, strict=True):
            stream.check(request)
        return [stream.token_ids for stream in self.streams]
