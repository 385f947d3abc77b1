"""What a chat's next turn costs: KV that moves, prompt that is computed, time to first token.

    python -m bench.turns --users 16 --turns 10

Starts ``kvferry serve`` on this machine as 1P1D and as 2P2D. All users talk at once, as text over
``/v1/chat/completions``, and wait for one another before the next turn. Whole blocks move, and the
last block of the turn before was not full: a turn may move its new tokens, the last answer not
among them, in whole blocks, and one block more (``bound``). Then the same chats are asked again
under cache salts of their own, so cold, all at once too.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from bench.serving.connection import Endpoint
from bench.serving.prompts import WORDS
from bench.serving.sse import SSEParser
from tests.stack import scrape

RESULTS = Path(__file__).parent / "results"
DEPLOYMENTS = {"1P1D": 1, "2P2D": 2}  # workers of each pool
TOLD = 1.0  # seconds until workers have told what they hold, and given back what they held


@dataclass(slots=True)
class Answer:
    """What one request was answered. Seconds from its sending."""

    ttft: float = math.inf
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class Chat:
    """One user's conversation so far."""

    random: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)
    said: int = 0  # tokens of the last prompt
    answered: int = 0  # and of its answer

    def ask(self, num_words: int) -> None:
        """The user says something."""
        words = self.random.choices(WORDS, k=num_words)
        self.messages.append({"role": "user", "content": " ".join(words)})

    def hear(self, answer: Answer) -> None:
        """The model has answered."""
        self.messages.append({"role": "assistant", "content": answer.text})
        self.said, self.answered = answer.prompt_tokens, answer.output_tokens


class Served:
    """A served model and its workers' pages of metrics."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self._model = self._client.get("/v1/models").json()["data"][0]["id"]
        self._endpoint = Endpoint(url, None)
        self._workers = self._client.get("/admin/workers").json()["workers"]
        self.block_size: int = self._workers[0]["block_size"]
        self.block_bytes: int = self._workers[0]["block_bytes"]

    def received(self) -> float:
        """Bytes of KV that have come to decode workers so far."""
        name = "kvferry_kv_transfer_bytes_total{direction=received}"
        decodes = [worker for worker in self._workers if worker["role"] == "decode"]
        return sum(scrape(worker["metrics"], self._client)[name] for worker in decodes)

    async def ask(self, messages: list[dict[str, str]], **fields: Any) -> Answer:
        """Send a chat. Raises RuntimeError when it is not answered."""
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        answer, parser, sent = Answer(), SSEParser(), time.perf_counter()
        async for status, piece in self._endpoint.post(
            "/v1/chat/completions", json.dumps(body).encode()
        ):
            if status != 200:
                raise RuntimeError(f"a chat was answered {status}")
            for event in parser.feed(piece.body):
                if event != b"[DONE]":
                    _take(answer, json.loads(event), piece.at - sent)
        return answer

    def close(self) -> None:
        """End the connections."""
        self._endpoint.close()
        self._client.close()


def _take(answer: Answer, event: dict[str, Any], seconds: float) -> None:
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            answer.text += text
            answer.ttft = min(answer.ttft, seconds)
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        answer.output_tokens = usage["completion_tokens"]


async def take_turn(
    served: Served, chats: list[Chat], number: int, num_words: int, output_tokens: int
) -> dict[str, float]:
    """One turn of all chats, and the same prompts cold. Times in milliseconds."""
    size, before = served.block_size, served.received()
    for chat in chats:
        chat.ask(num_words)
    answers = await asyncio.gather(
        *(served.ask(chat.messages, max_tokens=output_tokens) for chat in chats)
    )
    await asyncio.sleep(TOLD)
    moved_blocks = (served.received() - before) / served.block_bytes
    colds = await asyncio.gather(
        *(
            served.ask(chat.messages, max_tokens=output_tokens, cache_salt=f"cold {number} {user}")
            for user, chat in enumerate(chats)
        )
    )
    await asyncio.sleep(TOLD)
    new = bound = exact = 0
    for chat, answer in zip(chats, answers, strict=True):
        new_tokens = answer.prompt_tokens - chat.said - chat.answered
        new += new_tokens
        bound += math.ceil(new_tokens / size) + 1
        exact += answer.cached_tokens == chat.said // size * size
        chat.hear(answer)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    return {
        "turn": number,
        "prompt_tokens": prompt_tokens / len(chats),
        "new_tokens": new / len(chats),
        "moved_tokens": moved_blocks * size / len(chats),
        "moved_over_bound": moved_blocks / bound,
        "hit_rate": sum(answer.cached_tokens for answer in answers) / prompt_tokens,
        "exact_hits": exact / len(chats),
        **_times("ttft", answers),
        **_times("cold_ttft", colds),
    }


def _times(name: str, answers: list[Answer]) -> dict[str, float]:
    seconds = sorted(answer.ttft for answer in answers)
    worst = seconds[math.ceil(0.9 * len(seconds)) - 1]
    return {f"{name}_p50_ms": 1e3 * statistics.median(seconds), f"{name}_p90_ms": 1e3 * worst}


async def converse(
    served: Served, users: int, turns: int, num_words: int, output_tokens: int
) -> list[dict[str, float]]:
    """One row for each turn."""
    try:
        stranger = Chat(random.Random("warm-up"))
        await take_turn(served, [stranger], 0, num_words, output_tokens)
        chats = [Chat(random.Random(f"user {user}")) for user in range(users)]
        return [
            await take_turn(served, chats, number, num_words, output_tokens)
            for number in range(1, turns + 1)
        ]
    finally:
        served.close()


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    users: Annotated[int, typer.Option(help="Chats at once.", min=1)] = 16,
    turns: Annotated[int, typer.Option(help="Of each chat.", min=2)] = 10,
    words: Annotated[int, typer.Option(help="That a user says in a turn.", min=1)] = 48,
    output_tokens: Annotated[int, typer.Option(help="Of an answer, at most.", min=2)] = 48,
) -> None:
    """Print a table of each deployment and write both to bench/results/turns.json."""
    rows = {}
    for name, workers in DEPLOYMENTS.items():
        options = ["--disaggregation", "always"]  # what decode lacks moves
        options += ["--prefill", str(workers), "--decode", str(workers)]
        with serving(model, *options) as deployment:
            served = Served(deployment.url)
            rows[name] = asyncio.run(converse(served, users, turns, words, output_tokens))
        show(name, rows[name])
    RESULTS.mkdir(exist_ok=True)
    settings = {"model": model, "users": users, "words": words, "output_tokens": output_tokens}
    record = {"settings": settings, "deployments": rows}
    (RESULTS / "turns.json").write_text(json.dumps(record, indent=1) + "\n")


def show(name: str, rows: list[dict[str, float]]) -> None:
    """Print the turns as a table."""
    table = Table(*(column.replace("_", " ") for column in rows[0]), title=name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
