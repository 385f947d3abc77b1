"""The responses that this router remembers: the last ones, and those made in the background.

Only the API key that asked for a response sees it. All is forgotten when the router ends, and
other routers know nothing of it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidRequestError, RequestNotFoundError
from router.responses_output import ResponseOutput

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20  # of their JSON


@dataclass(frozen=True, slots=True)
class _Running:
    client: str
    output: ResponseOutput
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class _Finished:
    client: str
    background: bool
    content: bytes  # JSON


class ResponseStore:
    """By id. Of those that are over the oldest go first; the others are as many as are admitted."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._running: dict[str, _Running] = {}
        self._finished: OrderedDict[str, _Finished] = OrderedDict()
        self._num_bytes = 0

    def keep(self, client: str, response: dict[str, Any]) -> None:
        """Remember a response that is over."""
        content = _json(response)
        self._finished[response["id"]] = _Finished(client, response["background"], content)
        self._num_bytes += len(content)
        while len(self._finished) > self._max_responses or self._num_bytes > self._max_bytes:
            _, oldest = self._finished.popitem(last=False)
            self._num_bytes -= len(oldest.content)

    def start(
        self, client: str, output: ResponseOutput, work: Coroutine[Any, Any, None]
    ) -> dict[str, Any]:
        """The response as it begins. ``work`` brings it to its end, then it is kept."""
        response = output.present()
        response_id = response["id"]
        task = asyncio.create_task(work)
        self._running[response_id] = _Running(client, output, task)

        def end(_: asyncio.Task[None]) -> None:
            del self._running[response_id]
            self.keep(client, output.present())

        task.add_done_callback(end)
        return response

    def find(self, client: str, response_id: str) -> bytes:
        """A response as it is now, as JSON. Raises RequestNotFoundError."""
        running = self._running.get(response_id)
        if running is not None and running.client == client:
            return _json(running.output.present())
        return self._over(client, response_id).content

    def cancel(self, client: str, response_id: str) -> bytes:
        """End a response made in the background, if it is not over; as ``find``.

        Raises InvalidRequestError for any other response.
        """
        running = self._running.get(response_id)
        if running is not None and running.client == client:
            running.output.cancel()
            running.task.cancel()
        elif not self._over(client, response_id).background:
            message = "only a response made with background true can be cancelled"
            raise InvalidRequestError(message, "response_id")
        return self.find(client, response_id)

    def _over(self, client: str, response_id: str) -> _Finished:
        found = self._finished.get(response_id)
        if found is None or found.client != client:
            message = f"response {response_id!r} is not among those that this router remembers"
            raise RequestNotFoundError(message, "response_id")
        return found


def _json(response: dict[str, Any]) -> bytes:
    return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
