"""Runs a request: its pieces as they come, or all of them as one answer.

Whichever way a request ends, its generators are closed, which cancels it on the workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from protocol.errors import KvferryError
from router.answers import AnswerHead, Shape, best, joined, usage
from router.generation import GenerationRequest, Generator
from router.metrics import RouterMetrics, SequenceTimer
from router.output import Output, Piece
from router.timeline import FIRST_SEQUENCE

TRACEPARENT_LENGTH = 55  # as W3C's trace context says; later versions begin the same

T = TypeVar("T")


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

    def asked_by(self, client: str, traceparent: str = "") -> Job:
        """The same job, waiting for its turn under a client's name, part of the client's trace."""
        parent = traceparent[:TRACEPARENT_LENGTH]
        choices = [
            replace(choice, request=replace(choice.request, client=client, traceparent=parent))
            for choice in self.choices
        ]
        return replace(self, choices=choices)


def run(job: Job, generator: Generator, metrics: RouterMetrics) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices as they come. Raises KvferryError."""
    if len(job.choices) == 1:
        return _run_choice(job.choices[0], generator, metrics)
    return _run_choices(job, generator, metrics)


async def _run_choices(
    job: Job, generator: Generator, metrics: RouterMetrics
) -> AsyncGenerator[Piece, None]:
    """A prompt's other sequences start when decode has given its first one a token, or it has
    ended: only then both pools have the prompt's KV in their caches.
    """
    begun = [asyncio.Event() for _ in job.choices[:: job.num_sequences]]  # one a prompt
    streams = []
    for index, choice in enumerate(job.choices):
        prompt, sequence = divmod(index, job.num_sequences)
        pieces = _run_choice(choice, generator, metrics)
        if sequence > 0:
            choice.request.timeline.enter(FIRST_SEQUENCE, time.monotonic())
        streams.append(_in_turn(pieces, begun[prompt], leads=sequence == 0))
    async with aclosing(_interleave(streams)) as merged:
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
                yield piece  # which comes back when the piece was written to the client
                timer.tokens(len(piece.token_ids), chunk.num_cached_tokens)
                if piece.finish_reason is not None:
                    timer.finished(piece.finish_reason)
                    return
    raise KvferryError("the output ended without a finish reason")


async def _interleave(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of several streams in the order in which they come.

    A stream goes on when its item has been used, as if there were no others.
    """
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
                yield item
                waiting[asyncio.ensure_future(anext(stream))] = stream
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
