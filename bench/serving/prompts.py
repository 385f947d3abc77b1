"""Segments as what an endpoint takes: token ids, or text of about as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from bench.serving.workload import Segment
from protocol.errors import ConfigError

# Words that are one token each in large vocabularies. The calibration says what they are in the
# endpoint's own.
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Prompts as lists of token ids in [low, high): exact lengths, no tokenizer needed."""

    low: int
    high: int

    def render(self, prompt: Sequence[Segment]) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = []
        for segment in prompt:
            ids += Random(segment.key).choices(range(self.low, self.high), k=segment.length)
        return ids


@dataclass(frozen=True, slots=True)
class Words:
    """Prompts as text: a token costs ``1 / tokens_per_word`` words, ``overhead`` tokens are free.

    The overhead is what a chat template adds to every prompt.
    """

    tokens_per_word: float = 1.0
    overhead: float = 0.0

    def render(self, prompt: Sequence[Segment]) -> str:
        """Text of a prompt; at least one word."""
        words: list[str] = []
        tokens = 0
        for segment in prompt:
            tokens += segment.length
            random = Random(segment.key)
            wanted = round((tokens - self.overhead) / self.tokens_per_word)
            words += random.choices(WORDS, k=max(0, wanted - len(words)))
        return " ".join(words or WORDS[:1])

    @classmethod
    def calibrated(cls, few: tuple[int, int], many: tuple[int, int]) -> Words:
        """From two prompts' (words, tokens that the endpoint counted). Raises ConfigError."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        if slope <= 0:
            raise ConfigError(
                f"the endpoint counts {few[1]} tokens in {few[0]} words, {many[1]} in {many[0]}"
            )
        return cls(slope, few[1] - slope * few[0])
