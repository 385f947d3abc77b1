"""Chats as text whose workers are restarted, whose users are quick, and with several routers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from typing import Any

import pytest

from tests.e2e.test_prefix_routing import TOLD
from tests.replicas import Replicas
from tests.stack import scrape

pytestmark = pytest.mark.slow

USERS, TURNS, BLOCK = 4, 4, 16
# To what the demo model was trained on it gives an answer and ends it.
KNOWN = ("os.path.join", "json.loads", "heapq.heappush", "random.randint")


class Seeded(Replicas):
    """Every process hashes strings in its own way."""

    seeds = count(1)

    def launcher(self, name: str) -> Sequence[str]:
        return ("env", f"PYTHONHASHSEED={next(self.seeds)}")


@pytest.fixture(scope="module")
def stack() -> Iterator[Seeded]:
    worker = ["--dtype", "float32", "--block-size", str(BLOCK)]
    with Seeded("demo", 3, prefill=[(), ()], decode=[(), ()], worker=worker) as running:
        yield running


@dataclass(slots=True)
class Chat:
    """One user's conversation."""

    salt: str  # nobody else finds its KV
    questions: Iterator[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    num_tokens: int = 0  # of the last prompt and its answer
    num_prompt_tokens: int = 0
    cached: int = 0  # tokens of the last prompt
    expected: int = 0  # that the prefill worker of the turn before still has of it
    bound: int = 0  # blocks that all turns so far may move: each what is new of it, and one more

    def turn(self, stack: Seeded, url: str) -> None:
        text = f"What does {next(self.questions)} do?"
        self.messages.append({"role": "user", "content": text})
        body = {"model": "test", "messages": self.messages, "max_tokens": 200}
        body |= {"temperature": 0, "cache_salt": self.salt}
        answer: dict[str, Any] = (
            stack.client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
        )
        usage = answer["usage"]
        self.cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.expected = self.num_prompt_tokens // BLOCK * BLOCK
        self.bound += -(-(usage["prompt_tokens"] - self.num_tokens) // BLOCK) + 1
        self.num_prompt_tokens, self.num_tokens = usage["prompt_tokens"], usage["total_tokens"]
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"  # else its text might be other tokens next time
        self.messages.append({"role": "assistant", "content": choice["message"]["content"]})


def new_chats(name: str) -> list[Chat]:
    return [Chat(f"{name} {user}", islice(cycle(KNOWN), user, None)) for user in range(USERS)]


def moved_blocks(stack: Seeded) -> float:
    pages = [scrape(w["metrics"], stack.client) for w in stack.workers() if w["role"] == "decode"]
    name = "kvferry_kv_transfer_bytes_total{direction=received}"
    return sum(page[name] / page["kvferry_kv_block_bytes"] for page in pages)


def all_take_a_turn(stack: Seeded, chats: list[Chat]) -> None:
    """One after the other, each over the next router, which has heard by then that nobody waits.

    Else what the chat before queued at its worker might outweigh what this chat has there.
    """
    for chat in chats:
        chat.turn(stack, next(stack.turns))
        stack.assert_idle()
        time.sleep(TOLD)


def restart(stack: Seeded, role: str) -> None:
    for name in (f"{role}-0", f"{role}-1"):
        stack.processes[name].terminate()
        assert stack.processes.pop(name).wait(timeout=30) == 0
        stack.start_worker(role, name)
    stack.wait_for_workers(4)


def test_three_routers_find_what_is_cached_and_restarts_of_one_pool_leave_the_other(
    stack: Seeded,
) -> None:
    chats = new_chats("user")
    for number in range(TURNS):
        all_take_a_turn(stack, chats)
        if number:
            assert [chat.cached for chat in chats] == [chat.expected for chat in chats]
    assert moved_blocks(stack) <= sum(chat.bound for chat in chats)

    restart(stack, "prefill")
    all_take_a_turn(stack, chats)
    assert [chat.cached for chat in chats] == [0] * USERS
    assert moved_blocks(stack) <= sum(chat.bound for chat in chats)

    restart(stack, "decode")
    all_take_a_turn(stack, chats)
    assert [chat.cached for chat in chats] == [chat.expected for chat in chats]
    for url in stack.urls:
        router = scrape(f"{url}/metrics", stack.client)
        found = router["kvferry_router_found_cached_tokens_total"]
        assert router["kvferry_router_predicted_cached_tokens_total"] == found > 0
        assert router["kvferry_router_cache_resyncs_total"] == 0


def test_turns_that_follow_at_once_find_the_last_one_before_the_workers_tell_of_it(
    stack: Seeded,
) -> None:
    """Workers tell four times a second; an agent asks again within milliseconds."""
    before, bound, tokens = moved_blocks(stack), 0, [300] * BLOCK
    for turn in range(TURNS):
        body = {"model": "test", "prompt": tokens, "max_tokens": 2, "ignore_eos": True}
        body |= {"temperature": 0, "return_token_ids": True, "cache_salt": "agent"}
        answer = stack.client.post("/v1/completions", json=body).raise_for_status().json()
        tokens = [*tokens, *answer["choices"][0]["token_ids"], *([301 + turn] * 4 * BLOCK)]
        bound += 4 + 1
    stack.assert_idle()
    assert moved_blocks(stack) - before <= bound
