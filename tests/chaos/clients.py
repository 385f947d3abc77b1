"""Clients that stream completions while a scenario does something to the servers."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.chaos.asks import Ask

PATIENCE = 120.0  # seconds until a client gives a stream up
FINISHED = "finished"
CANCELLED = "cancelled"


@dataclass(eq=False)
class Stream:
    """One streamed completion as its client sees it. Times are of ``time.monotonic``.

    ``ending`` is empty while it is open; then ``finished``, ``cancelled`` by the client, or the
    kind of error: a refusal's status and code, ``event`` and the code of an error event, ``cut``
    or ``unreachable`` for a connection lost or never made, ``unanswered``, or ``malformed``.
    """

    ask: Ask
    opened: float = field(default_factory=time.monotonic)
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # of tokens, after each arrival
    ending: str = ""
    ended: float = 0.0
    _reasons: list[str] = field(default_factory=list)
    _usage: dict[str, int] = field(default_factory=dict)
    _error: str = ""

    @property
    def longest_wait(self) -> float:
        """Seconds that the client waited for a token at most, the first one included."""
        times = [self.opened, *self.arrivals]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    @property
    def longest_gap(self) -> tuple[float, int]:
        """Seconds between two arrivals at most, and the tokens until then, the prompt's included.

        Whoever resumes the stream after the gap has to compute those tokens' KV.
        """
        pairs = zip(itertools.pairwise(self.arrivals), self.counts, strict=False)
        gaps = [(later - earlier, len(self.ask.prompt) + n) for (earlier, later), n in pairs]
        return max(gaps, default=(0.0, 0))

    def take(self, event: dict[str, Any]) -> None:
        """Note one server-sent event."""
        if "error" in event:
            self._error = f"event {event['error']['code']}"
        elif event["choices"]:
            [choice] = event["choices"]
            if choice["token_ids"]:
                self.arrivals.append(time.monotonic())
                self.token_ids += choice["token_ids"]
                self.counts.append(len(self.token_ids))
            self._reasons += [r for r in [choice["finish_reason"]] if r is not None]
        else:
            self._usage = event["usage"]

    def close(self, *, complete: bool) -> str:
        """How it ended, once no more events come; ``complete`` if the server said it was all."""
        if self._error or not complete:
            return self._error or "cut"
        usage = {"prompt_tokens": len(self.ask.prompt), "completion_tokens": len(self.token_ids)}
        counted = usage.items() <= self._usage.items()
        return FINISHED if counted and len(self._reasons) == 1 else "malformed"


class Clients:
    """``with Clients(url) as clients``: the streams are read on one thread of its own."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._address = where.hostname, where.port
        self._head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clients", daemon=True)
        self._tasks: dict[Stream, asyncio.Task[str]] = {}  # of open streams, touched by the thread

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = list(self._tasks)
        self.cancel(left)
        self.join(left)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, ask: Ask) -> Stream:
        """Send a request."""
        stream = Stream(ask)
        self._loop.call_soon_threadsafe(self._begin, stream)
        return stream

    def cancel(self, streams: Iterable[Stream]) -> None:
        """Go away from streams, without a word."""
        for stream in streams:
            self._loop.call_soon_threadsafe(self._cancel, stream)

    def join(self, streams: Iterable[Stream]) -> None:
        """Wait for the end of streams, however they end."""
        for stream in streams:
            while not stream.ending:
                time.sleep(0.002)

    def _begin(self, stream: Stream) -> None:
        task = self._loop.create_task(self._read(stream))
        self._tasks[stream] = task
        task.add_done_callback(partial(self._end, stream))

    def _cancel(self, stream: Stream) -> None:
        if stream in self._tasks:
            self._tasks[stream].cancel()

    def _end(self, stream: Stream, task: asyncio.Task[str]) -> None:
        del self._tasks[stream]
        stream.ended = time.monotonic()
        stream.ending = CANCELLED if task.cancelled() else task.result()

    async def _read(self, stream: Stream) -> str:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._exchange(stream)
        except TimeoutError:
            return "unanswered"
        except (OSError, asyncio.IncompleteReadError):
            return "cut" if stream.arrivals else "unreachable"
        except (ValueError, KeyError):
            return "malformed"

    async def _exchange(self, stream: Stream) -> str:
        content = json.dumps(stream.ask.body()).encode()
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            length = f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(self._head.encode() + length.encode() + content)
            status = (await reader.readline()).decode().split(" ")
            if len(status) < 2:
                return "cut"
            if status[1] != "200":
                await reader.readuntil(b"\r\n\r\n")
                refusal = json.loads(await reader.read())
                return f"{status[1]} {refusal['error']['code']}"
            complete = False
            while line := await reader.readline():
                if line == b"data: [DONE]\n":
                    complete = True
                elif line.startswith(b"data: "):
                    stream.take(json.loads(line.removeprefix(b"data: ")))
            return stream.close(complete=complete)
        finally:
            writer.transport.abort()
