"""Brings a request's tokens to its client: as server-sent events or as one answer.

A stream ends in exactly one of three ways: ``[DONE]``, one error event, or the client's leaving.
Whichever way a request ends, its generators are closed, which cancels it on the workers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from protocol.errors import KvferryError
from router.answers import AnswerHead, Shape, best, joined, usage
from router.generation import GenerationRequest, Generator
from router.http_errors import INTERNAL_ERROR, error_body
from router.metrics import RouterMetrics, SequenceTimer
from router.output import Output, Piece
from router.timeline import FIRST_SEQUENCE

T = TypeVar("T")

# Some clients split a stream into lines as Unicode does, not as server-sent events do.
UNICODE_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a request and how its output is shown."""

    request: GenerationRequest
    output: Output


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request."""

    head: AnswerHead
    shape: Shape
    choices: Sequence[Choice]  # those of one prompt lie together
    num_sequences: int  # generated for each prompt
    num_shown: int  # of those: the best
    stream: bool
    include_usage: bool
    return_token_ids: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, however many sequences continue each."""
        leaders = self.choices[:: self.num_sequences]
        return sum(len(choice.request.prompt_token_ids) for choice in leaders)

    def num_cached_tokens(self, piece: Piece) -> int:
        """Prompt tokens that the piece says were not computed; a prompt's first sequence tells."""
        return 0 if piece.index % self.num_sequences else piece.num_cached_tokens

    def asked_by(self, client: str) -> Job:
        """The same job, waiting for its turn under a client's name."""
        choices = [
            replace(choice, request=replace(choice.request, client=client))
            for choice in self.choices
        ]
        return replace(self, choices=choices)


async def run(
    job: Job, generator: Generator, metrics: RouterMetrics
) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices as they come. Raises KvferryError.

    A prompt's other sequences start when decode has given its first one a token, or it has ended:
    only then both pools have the prompt's KV in their caches.
    """
    begun = [asyncio.Event() for _ in job.choices[:: job.num_sequences]]  # one a prompt
    streams = []
    for index, choice in enumerate(job.choices):
        prompt, sequence = divmod(index, job.num_sequences)
        pieces = _run_choice(choice, generator, metrics)
        if sequence > 0:
            choice.request.timeline.enter(FIRST_SEQUENCE, time.monotonic())
        streams.append(_in_turn(pieces, begun[prompt], leads=sequence == 0))
    merged = streams[0] if len(streams) == 1 else _interleave(streams)
    async with aclosing(merged):
        async for piece in merged:
            yield piece


async def _in_turn(
    pieces: AsyncGenerator[Piece, None], begun: asyncio.Event, *, leads: bool
) -> AsyncGenerator[Piece, None]:
    async with aclosing(pieces):
        if not leads:
            await begun.wait()
        tokens_came = False
        async for piece in pieces:
            if tokens_came or piece.finish_reason is not None:  # prefill gave only the first
                begun.set()
            tokens_came = True
            yield piece


async def _run_choice(
    choice: Choice, generator: Generator, metrics: RouterMetrics
) -> AsyncGenerator[Piece, None]:
    with SequenceTimer(metrics, choice.request) as timer:
        async with aclosing(generator.generate(choice.request)) as chunks:
            async for chunk in chunks:
                piece = choice.output.push(chunk)
                timer.tokens(len(piece.token_ids), chunk.num_cached_tokens)
                if piece.finish_reason is not None:
                    timer.finished(piece.finish_reason)
                yield piece
                if piece.finish_reason is not None:
                    return
    raise KvferryError("the output ended without a finish reason")


async def _interleave(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of several streams in the order in which they come."""
    waiting = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(stream))] = stream
                yield item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """``work``'s result. When the client goes first: cancels it and raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole_answer(job: Job, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
    """Everything in one body."""
    outputs: list[list[Piece]] = [[] for _ in job.choices]
    async with aclosing(pieces):
        async for piece in pieces:
            outputs[piece.index].append(piece)
    sequences = [joined(output) for output in outputs]
    choices: list[dict[str, Any]] = []
    for start in range(0, len(sequences), job.num_sequences):
        group = sequences[start : start + job.num_sequences]
        for piece in best(group, job.num_shown) if job.num_shown < len(group) else group:
            choice = job.shape.choice(replace(piece, index=len(choices)))
            if job.return_token_ids:
                choice["prompt_token_ids"] = job.choices[start].request.prompt_token_ids
                choice["token_ids"] = piece.token_ids
            choices.append(choice)
    return {
        **job.head.fields(job.shape.whole),
        "choices": choices,
        "usage": usage(
            job.num_prompt_tokens,
            sum(len(piece.token_ids) for piece in sequences),
            sum(map(job.num_cached_tokens, sequences)),
        ),
    }


class EventStream(Response):
    """The answer as server-sent events, one for each piece.

    ``first`` was awaited before, so that what fails before any token is answered with its status.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self, job: Job, first: Piece, pieces: AsyncGenerator[Piece, None], metrics: RouterMetrics
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job = job
        self._first = first
        self._pieces = pieces
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end or until the client goes."""
        async with aclosing(self._pieces):
            try:
                await while_connected(receive, self._write(send))
            except ClientDisconnect:  # no answer can follow the one that began
                self._metrics.client_left()

    async def _write(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    await send(_body(event, more_body=True))
        except Exception:  # a bug: the client is told so; it is counted and logged further up
            await send(_body(_event(error_body(INTERNAL_ERROR)), more_body=False))
            raise
        await send(_body(b"", more_body=False))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    yield _event(chunk)
        except KvferryError as error:
            self._metrics.failed(error.status, error.code)
            yield _event(error_body(error))
            return
        yield b"data: [DONE]\n\n"

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        job = self._job
        head = job.head.fields(job.shape.chunk)
        if job.include_usage:
            head["usage"] = None
        for choice in range(len(job.choices)):
            opening = job.shape.opening(choice)
            if opening is not None:
                yield {**head, "choices": [opening]}
        num_tokens = num_cached = 0
        told = [not job.return_token_ids] * len(job.choices)  # whose prompt's ids were sent
        async with aclosing(self._all_pieces()) as pieces:
            async for piece in pieces:
                num_tokens += len(piece.token_ids)
                num_cached += job.num_cached_tokens(piece)
                if not (piece.shows or job.return_token_ids):
                    continue
                delta = job.shape.delta(piece)
                if job.return_token_ids:
                    delta["token_ids"] = piece.token_ids
                if not told[piece.index]:
                    told[piece.index] = True
                    request = job.choices[piece.index].request
                    delta["prompt_token_ids"] = request.prompt_token_ids
                yield {**head, "choices": [delta]}
        if job.include_usage:
            counts = usage(job.num_prompt_tokens, num_tokens, num_cached)
            yield {**head, "choices": [], "usage": counts}

    async def _all_pieces(self) -> AsyncGenerator[Piece, None]:
        yield self._first
        async for piece in self._pieces:
            yield piece


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(UNICODE_LINE_ENDS)
    return f"data: {text}\n\n".encode()


def _body(content: bytes, *, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more_body}
