"""What clients ask for, drawn by a seed, and the tokens that an undisturbed engine gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence as Tokens
from protocol.sampling import SamplingParams
from tests.engine.driver import generate, step

ROUNDING = 1e-4  # of a logit, in float32 and by whatever order it was summed
VOCABULARY = 256  # token ids below the special ones
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {
    "temperature": 1.1,
    "top_p": 0.95,
    "seed": 5,
    "presence_penalty": 0.4,
    "repetition_penalty": 1.05,
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion to ask for."""

    prompt: tuple[int, ...]
    max_tokens: int
    seeded: bool = False
    timeout: float | None = None  # seconds that it may take

    def body(self) -> dict[str, Any]:
        """The JSON of a streamed completion."""
        return {
            "model": "test",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timeout": self.timeout,
            **(SEEDED if self.seeded else GREEDY),
        }


def draw(
    rng: random.Random, count: int, *, prompt: tuple[int, int], output: tuple[int, int]
) -> list[Ask]:
    """``count`` asks with lengths in these ranges; nothing of the prompts was ever seen before."""
    return [
        Ask(
            prompt=tuple(rng.choices(range(VOCABULARY), k=rng.randint(*prompt))),
            max_tokens=rng.randint(*output),
            seeded=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def mixed(rng: random.Random, count: int) -> list[Ask]:
    """Mostly short prompts with long answers, and every fourth a long prompt."""
    num_long = count // 4
    short = draw(rng, count - num_long, prompt=(1, 80), output=(250, 500))
    return [*draw(rng, num_long, prompt=(700, 1500), output=(30, 80)), *short]


class Reference:
    """An engine in this process, without router, transfer, cache or restarts."""

    def __init__(self, model: Path) -> None:
        config = EngineConfig(
            str(model), dtype="float32", device="cpu", num_blocks=2048, num_threads=1
        )
        self._engine = Engine.load(config)

    def answers(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The tokens of each answer."""
        answers: dict[int, list[int]] = {}
        for seeded, options in ((False, GREEDY), (True, SEEDED)):
            chosen = [index for index, ask in enumerate(asks) if ask.seeded is seeded]
            if chosen:
                longest = max(asks[index].max_tokens for index in chosen)
                sampling = SamplingParams(max_tokens=longest, **options)
                tokens = generate(self._engine, [list(asks[i].prompt) for i in chosen], sampling)
                answers |= dict(zip(chosen, tokens, strict=True))
        return [answers[index][: ask.max_tokens] for index, ask in enumerate(asks)]

    def is_tie(self, ask: Ask, tokens: Sequence[int], other: int) -> bool:
        """Whether rounding decides if ``other`` follows these tokens of the answer.

        It follows if its logit gains ``ROUNDING``. Batches and chunks sum in different orders.
        """
        options = SEEDED if ask.seeded else GREEDY
        bias = ((other, ROUNDING),)
        sampling = SamplingParams(max_tokens=len(tokens) + 1, logit_bias=bias, **options)
        sequence = Tokens("tie", [*ask.prompt, *tokens], len(ask.prompt), sampling)
        count = self._engine.geometry.blocks_for(sequence.num_tokens + 1)
        sequence.block_table = list(range(count))
        step(self._engine, [sequence], sequence.num_tokens)
        return sequence.token_ids[-1] == other
