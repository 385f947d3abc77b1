"""Chats over two workers of each pool: their turns go where their KV is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from tests.stack import Stack, scrape

USERS, TURNS = 4, 5
BLOCK = 8
NEW, ANSWER = 11, 6  # tokens of a turn
TOLD = 1.0  # seconds in which workers have told their routers what they hold


class Seeded(Stack):
    """Every process hashes strings in its own way."""

    seeds = count(1)

    def launcher(self, name: str) -> Sequence[str]:
        return ("env", f"PYTHONHASHSEED={next(self.seeds)}")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")
    worker = ["--dtype", "float32", "--block-size", str(BLOCK)]
    with Seeded(model, prefill=[(), ()], decode=[(), ()], worker=worker) as running:
        yield running


class Chat:
    """One user's tokens so far."""

    def __init__(self, user: int) -> None:
        self.tokens = [10 + user] * 30
        self.cached = 0

    def turn(self, stack: Stack) -> None:
        body = {
            "model": "test",
            "prompt": self.tokens,
            "max_tokens": ANSWER,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer: dict[str, Any] = (
            stack.client.post("/v1/completions", json=body).raise_for_status().json()
        )
        self.cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        new = [20 + len(self.tokens) % 7] * NEW
        self.tokens = [*self.tokens, *answer["choices"][0]["token_ids"], *new]


def moved_blocks(stack: Stack) -> float:
    received = stack.metrics("decode")
    name = "kvferry_kv_transfer_bytes_total{direction=received}"
    return 2 * received[name] / received["kvferry_kv_block_bytes"]  # of both workers, summed


def turn(stack: Stack, chats: list[Chat]) -> float:
    """All users at once; the blocks that moved."""
    before = moved_blocks(stack)
    with ThreadPoolExecutor(len(chats)) as threads:
        list(threads.map(lambda chat: chat.turn(stack), chats))
    stack.assert_idle()
    time.sleep(TOLD)
    return moved_blocks(stack) - before


def test_a_turn_computes_and_moves_only_what_is_new(stack: Stack) -> None:
    chats = [Chat(user) for user in range(USERS)]
    for number in range(TURNS):
        lengths = [len(chat.tokens) for chat in chats]
        moved = turn(stack, chats)
        if number > 0:
            assert moved <= USERS * (-(-NEW // BLOCK) + 1)
            # What prefill computed of the turn before it has; not what decode generated then.
            had = [length - NEW - ANSWER for length in lengths]
            assert [chat.cached for chat in chats] == [n // BLOCK * BLOCK for n in had]
    router = scrape(f"{stack.url}/metrics", stack.client)
    found = router["kvferry_router_found_cached_tokens_total"]
    assert router["kvferry_router_predicted_cached_tokens_total"] == found > 0
    assert router["kvferry_router_cache_resyncs_total"] == 0

    for name in ("decode-0", "decode-1"):
        stack.processes[name].terminate()
        assert stack.processes.pop(name).wait(timeout=30) == 0
        stack.start_worker("decode", name)
    stack.wait_for_workers(4)
    lengths = [len(chat.tokens) for chat in chats]
    turn(stack, chats)
    had = [length - NEW - ANSWER for length in lengths]
    assert [chat.cached for chat in chats] == [n // BLOCK * BLOCK for n in had]
