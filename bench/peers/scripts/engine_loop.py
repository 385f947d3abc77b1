"""What the scripts of all engines share: the same prompts and the same clock.

Imports nothing but the standard library, as every engine's own interpreter runs it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from lines import answer, claim_output

WINDOWS = 3  # a decode case is measured in this many parts, so that one disturbance shows as such
RESERVE = 64  # tokens that a sequence may generate before the last one has its first
REQUESTS = 1000  # of one case at most
WARM_UP: tuple[dict[str, Any], ...] = (
    {"kind": "prefill", "tokens": 64, "repeats": 1},
    {"kind": "decode", "sequences": 2, "context": 32, "steps": 2},
)


class Engine(Protocol):
    """What a peer's script provides. Token ids in, tokens counted; greedy, no stop token."""

    def submit(self, number: int, prompt: list[int], output_tokens: int) -> None:
        """Queue a request."""

    def advance(self) -> Iterable[int]:
        """Compute until tokens come, and give the request number of each of them."""

    def clear(self) -> None:
        """Forget every request."""


def prompt(number: int, tokens: int, vocab_size: int) -> list[int]:
    """Prompts of which no two share a prefix; every peer gets the same ones."""
    rng = random.Random(number)
    return [rng.randrange(1000, vocab_size) for _ in range(tokens)]


def measure(engine: Engine, case: dict[str, Any], vocab_size: int, first: int) -> list[float]:
    """Tokens per second, one figure per repeat (prefill) or window (decode).

    ``first`` numbers the case's requests; no number is used twice.
    """
    if case["kind"] == "prefill":
        return [
            _prefill(engine, prompt(first + repeat, case["tokens"], vocab_size), first + repeat)
            for repeat in range(case["repeats"])
        ]
    prompts = {
        first + i: prompt(first + i, case["context"], vocab_size) for i in range(case["sequences"])
    }
    return _decode(engine, prompts, case["steps"])


def _prefill(engine: Engine, tokens: list[int], number: int) -> float:
    """From the request to its first token."""
    start = time.perf_counter()
    engine.submit(number, tokens, 1)
    while number not in engine.advance():
        pass
    seconds = time.perf_counter() - start
    engine.clear()
    return len(tokens) / seconds


def _decode(engine: Engine, prompts: dict[int, list[int]], steps: int) -> list[float]:
    """Once every sequence has its first token: all sequences' tokens over the time they take."""
    for number, tokens in prompts.items():
        engine.submit(number, tokens, RESERVE + (WINDOWS + 1) * steps)
    waiting = set(prompts)
    while waiting:
        waiting.difference_update(engine.advance())
    rates = []
    for _ in range(WINDOWS):
        count, start = 0, time.perf_counter()
        while count < steps * len(prompts):
            count += len(list(engine.advance()))
        rates.append(count / (time.perf_counter() - start))
    engine.clear()
    return rates


@dataclass(frozen=True, slots=True)
class Setup:
    """What the driver asks of an engine; one JSON argument on the command line."""

    model: str  # a folder, or the file or folder it was converted to
    weights: str  # "16-bit" or "8-bit"
    threads: int
    vocab_size: int
    kv_tokens: int  # room for KV, over all sequences
    kv_token_bytes: int  # KV of one token at 16 bits a number
    max_model_len: int = 4608  # tokens of the longest sequence
    chunk: int = 512  # prompt tokens of a step
    max_num_seqs: int = 32
    device: str = "cpu"
    load_format: str = "auto"  # dummy: random weights, from the configuration alone

    @property
    def kv_bytes(self) -> int:
        """Memory for KV at 16 bits a number."""
        return self.kv_tokens * self.kv_token_bytes


def serve(load: Callable[[Setup], tuple[Engine, dict[str, Any]]]) -> None:
    """Load an engine, warm it up, and answer the driver's cases until they end."""
    answers = claim_output()
    setup = Setup(**json.loads(sys.argv[1]))
    engine, about = load(setup)
    first = itertools.count(step=REQUESTS)

    def measure_case(case: dict[str, Any]) -> list[float]:
        return measure(engine, case, setup.vocab_size, next(first))

    for case in WARM_UP:
        measure_case(case)
    answer(answers, about, measure_case)
    os._exit(0)  # some peers' threads outlive their main one
