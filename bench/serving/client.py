"""One streamed request to an OpenAI endpoint, timed. It never raises for what an endpoint does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.serving.connection import ConnectionLostError, Endpoint
from bench.serving.prompts import TokenIds, Words
from bench.serving.record import Result
from bench.serving.sse import SSEError, SSEParser
from bench.serving.workload import Item, Segment
from protocol.errors import ConfigError

Api = Literal["completions", "chat"]

CALIBRATION = (32, 288)  # words of two prompts
MESSAGE_LENGTH = 200  # characters kept of an error


class AnswerError(Exception):
    """The answer is of no use. ``kind`` groups such answers."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Answer:
    """What has come of a stream."""

    times: list[float] = field(default_factory=list)  # time.perf_counter() of events with text
    done: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    status: int = 0
    refusal: bytes = b""  # body of a status other than 200
    parser: SSEParser = field(default_factory=SSEParser)

    def push(self, body: bytes, at: float) -> None:
        """Some bytes that came at ``at``. Raises AnswerError."""
        if self.status != 200:
            self.refusal += body
            return
        try:
            for event in self.parser.feed(body):
                if event == b"[DONE]":
                    self.done = True
                else:
                    self._event(json.loads(event), at)
        except (ValueError, LookupError, TypeError, AttributeError, SSEError) as error:
            raise AnswerError("malformed", repr(error)) from error

    def end(self) -> None:
        """The stream has ended. Raises AnswerError unless it was whole."""
        if self.status != 200:
            raise AnswerError(f"http {self.status}", _said(self.refusal))
        if not self.done:
            where = "within an event" if self.parser.inside_event else "between events"
            raise AnswerError("cut", f"the stream ended {where}, without [DONE]")
        if not self.times:
            raise AnswerError("empty", "the stream has no text")

    def _event(self, event: dict[str, Any], at: float) -> None:
        if "error" in event:
            raise AnswerError("error event", _said(json.dumps(event).encode()))
        for choice in event["choices"]:
            delta = choice.get("delta", choice)
            if delta.get("text") or delta.get("content") or delta.get("reasoning_content"):
                self.times.append(at)
        if usage := event.get("usage"):
            self.prompt_tokens = int(usage["prompt_tokens"])
            self.output_tokens = int(usage["completion_tokens"])


@dataclass(frozen=True, slots=True)
class Client:
    """How requests are put: to which route, with which model and options."""

    endpoint: Endpoint
    model: str
    api: Api
    prompts: TokenIds | Words
    timeout: float = 600.0  # seconds for a whole answer
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields of the body

    @property
    def path(self) -> str:
        """The route."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, item: Item) -> bytes:
        """The JSON of a request; make it before the clock counts."""
        prompt = self.prompts.render(item.prompt)
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.api == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps({**fields, **self.extra}, separators=(",", ":")).encode()

    async def ask(self, index: int, item: Item, body: bytes, start: float, due: float) -> Result:
        """Send now and await the end. Times are those of time.perf_counter()."""
        answer, sent = Answer(), time.perf_counter()
        kind: str | None = None
        message = ""
        try:
            async with (
                asyncio.timeout(self.timeout),
                aclosing(self.endpoint.post(self.path, body)) as pieces,
            ):
                async for answer.status, piece in pieces:
                    answer.push(piece.body, piece.at)
            answer.end()
        except AnswerError as error:
            kind, message = error.kind, str(error)
        except ConnectionLostError as error:
            kind, message = "disconnected", str(error)
        except TimeoutError:
            kind, message = "timeout", f"no end after {self.timeout:g} s"
        except OSError as error:
            kind, message = "connect", str(error)
        told = answer.output_tokens
        return Result(
            index=index,
            scheduled=due - start,
            sent=sent - start,
            ended=time.perf_counter() - start,
            prompt_tokens=answer.prompt_tokens or item.prompt_tokens,
            expected_tokens=item.output_tokens,
            output_tokens=len(answer.times) if told is None else max(told, len(answer.times)),
            times=tuple(at - sent for at in answer.times),
            error=kind,
            message=message[:MESSAGE_LENGTH],
        )


async def served_model(endpoint: Endpoint) -> str:
    """The name of the first model that the endpoint lists. Raises ConfigError."""
    try:
        status, body = await endpoint.get("/v1/models")
        if status != 200:
            raise ConfigError(f"/v1/models answered {status}: {_said(body)}")
        return str(json.loads(body)["data"][0]["id"])
    except (OSError, ConnectionLostError) as error:
        raise ConfigError(f"the endpoint cannot be reached: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"/v1/models lists no model: {error!r}; name one by --model") from error


async def calibrated_words(client: Client) -> Words:
    """How the endpoint counts a text's tokens, by asking it. Raises ConfigError."""
    counts = []
    for words in CALIBRATION:
        item = Item(0.0, (Segment("calibration", words),), 1)
        now = time.perf_counter()
        result = await client.ask(0, item, client.body(item), now, now)
        if result.error not in (None, "empty"):
            raise ConfigError(f"the endpoint does not answer: {result.error}: {result.message}")
        counts.append((words, result.prompt_tokens))
    return Words.calibrated(*counts)


def _said(body: bytes) -> str:
    """The message of an error's body, or the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace").strip()
