"""What waits for a request's reader."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import DeadlineError
from protocol.sampling import TokenLogprobs
from router.generation import TokenChunk
from router.outbox import Outbox


def scored(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(token_id), rank=1, top=[])


async def test_a_reader_that_waits_gets_each_chunk() -> None:
    outbox = Outbox()
    for token_id in range(3):
        reading = asyncio.create_task(outbox.get())
        await asyncio.sleep(0)
        outbox.put(TokenChunk([token_id]))
        assert await reading == TokenChunk([token_id])


async def test_what_waits_is_one_chunk() -> None:
    outbox = Outbox()
    outbox.put(TokenChunk([1], logprobs=[scored(1)], num_cached_tokens=5))
    outbox.put(TokenChunk([2, 3], logprobs=[scored(2), scored(3)]))
    outbox.put(TokenChunk([], "stop"))
    assert await outbox.get() == TokenChunk(
        [1, 2, 3], "stop", logprobs=[scored(1), scored(2), scored(3)], num_cached_tokens=5
    )
    assert outbox.take() is None


async def test_an_error_comes_after_the_tokens_before_it_and_stays() -> None:
    outbox = Outbox()
    outbox.put(TokenChunk([1]))
    outbox.put(DeadlineError("too long"))
    assert await outbox.get() == TokenChunk([1])
    for _ in range(2):
        with pytest.raises(DeadlineError, match="too long"):
            await outbox.get()


async def test_a_reader_that_gave_up_leaves_what_comes_to_the_next() -> None:
    outbox = Outbox()
    reading = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    reading.cancel()
    outbox.put(TokenChunk([1]))
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await outbox.get() == TokenChunk([1])
