"""An OpenAI endpoint made up for tests: it says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Frame = tuple[float, bytes]  # seconds to wait, then raw bytes of the answer's body
Script = Callable[[str, dict[str, Any]], Sequence[Frame]]

DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def token(path: str, text: str = " x") -> bytes:
    if path.endswith("/chat/completions"):
        return event({"choices": [{"index": 0, "delta": {"content": text}}]})
    return event({"choices": [{"index": 0, "text": text}]})


def used(prompt: int, output: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"choices": [], "usage": usage})


def speaker(ttft: float = 0.0, tpot: float = 0.0, overhead: int = 0) -> Script:
    """An endpoint that answers in full, at its leisure; a word of text is two tokens of it."""

    def script(path: str, body: dict[str, Any]) -> Sequence[Frame]:
        if "messages" in body:
            prompt = overhead + 2 * len(body["messages"][0]["content"].split())
            opening = event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        else:
            prompt, opening = len(body["prompt"]), b""
        count = body["max_tokens"]
        tokens = [(tpot if index else ttft, token(path)) for index in range(count)]
        return [(0.0, opening), *tokens, (0.0, used(prompt, count) + DONE)]

    return script


class FakeEndpoint:
    """Serves a script; ``bodies`` holds what it was asked.

    ``cut`` closes the connection before an answer's end; ``one_at_a_time`` makes a queue.
    """

    def __init__(
        self, script: Script, status: int = 200, cut: bool = False, one_at_a_time: bool = False
    ) -> None:
        self.script, self.status, self.cut = script, status, cut
        self.turn = asyncio.Semaphore(1 if one_at_a_time else 10_000)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.keys.append(headers.get("authorization"))
        method, path, _ = first.split()
        if method == "GET":
            self._plain(writer, 200, {"data": [{"id": "fake"}]})
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.bodies.append(body)
        if self.status != 200:
            self._plain(writer, self.status, {"error": {"message": "not now"}})
            return True
        writer.write(HEAD)
        async with self.turn:
            for wait, data in self.script(path, body):
                await asyncio.sleep(wait)
                if data:
                    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                    await writer.drain()
        if self.cut:
            return False
        writer.write(b"0\r\n\r\n")
        return True

    def _plain(self, writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(content)))
        writer.write(content)


@contextlib.contextmanager
def serving(endpoint: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """In a thread of its own, so that commands that block can be tested against it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield endpoint
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
