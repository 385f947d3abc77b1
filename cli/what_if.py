"""Predictions for the router's console, made in a process of their own.

A simulation in the router's process, in a thread too, would hold up the streams that it serves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any

from protocol.errors import DeadlineError, InvalidRequestError, KvferryError, OverloadedError
from router.what_if_routes import Question, WhatIfBody

DEADLINE = 10.0  # seconds for an answer, the questions before it included
MAX_WAITING = 8  # questions at once; a console asks one at a time


class Simulation:
    """Asks one process, started for the first question, one question after the other."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def predict(self, question: Question) -> dict[str, Any]:
        """See ``router.what_if_routes.Predictor``."""
        if self._num_waiting == MAX_WAITING:
            raise OverloadedError("too many predictions are being made")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(DEADLINE), self._turn:
                reply = await self._exchange(_line(question))
        except TimeoutError:
            raise DeadlineError(f"the prediction took longer than {DEADLINE:g} s") from None
        finally:
            self._num_waiting -= 1
        if "error" in reply:
            raise InvalidRequestError(reply["error"])
        found: dict[str, Any] = reply["answer"]
        return found

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        """A question and its answer. A process that has not answered is not asked again."""
        process, answer = await self._running(), b""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            await process.stdin.drain()
            answer = await process.stdout.readline()
        except ConnectionError:
            pass
        finally:
            if not answer:
                await self.close()
        if not answer:
            raise KvferryError("the simulating process ended; the router's log has details")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            command = (sys.executable, "-m", "cli.what_if_process")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        return self._process


def _line(question: Question) -> bytes:
    asked = question.asked
    fields = {
        "asked": asked and asked.model_dump(include=set(WhatIfBody.model_fields)),
        "workload": question.workload,
        "workers": question.workers,
        "local_prefill_tokens": question.local_prefill_tokens,
    }
    return json.dumps(fields).encode() + b"\n"
