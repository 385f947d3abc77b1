"""What is asked for: requests with an arrival, a prompt made of segments, and an output length.

A segment is a piece of a stream of pseudo-random tokens: two prompts that begin with the same
segments begin with the same tokens, which is all a prefix cache looks at.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from bench.serving.arrivals import at_once, renewal, rescaled
from planner.workload import PREFIX_TOKENS, Lengths, Request, read_trace
from protocol.errors import ConfigError

# Mean and coefficient of variation of 300 ShareGPT conversations' lengths, in tokens.
SHAREGPT_PROMPT, SHAREGPT_OUTPUT = Lengths(857, 0.615), Lengths(653, 0.151)

_UNIFORM = re.compile(r"(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:([\d.]+):([\d.]+)")


@dataclass(frozen=True, slots=True)
class Segment:
    """The first ``length`` tokens of the stream that ``key`` names."""

    key: str
    length: int


@dataclass(frozen=True, slots=True)
class Item:
    """One request to send ``arrival`` seconds after the run's start."""

    arrival: float
    prompt: tuple[Segment, ...]
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return sum(segment.length for segment in self.prompt)


class Draw(Protocol):
    """A distribution of token counts."""

    def draw(self, random: Random) -> int:
        """One count, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every count from ``low`` to ``high``, both included, alike."""

    low: int
    high: int

    def draw(self, random: Random) -> int:
        """One count."""
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Workload:
    """How requests are made. Frozen: the same value gives the same requests."""

    count: int
    rate: float | None  # requests a second; None: the trace's own, or a closed loop
    variation: float | None = None  # of the gaps between arrivals; None: the trace's, or 1
    prompt: Draw = Uniform(512, 512)  # lengths; a trace brings its own
    output: Draw = Uniform(128, 128)
    prefix_groups: int = 0  # groups of requests whose prompts begin alike; 0: none do
    prefix_share: float = 0.5  # of a prompt that its group shares
    trace: Path | None = None
    length_divisor: int = 1  # of a trace's lengths, for models smaller than its own
    max_len: int | None = None  # tokens of prompt plus output; longer prompts are cut
    seed: int = 0

    def items(self) -> list[Item]:
        """The requests, in order of arrival. Raises ConfigError."""
        random = Random(f"{self.seed} lengths")
        if self.trace is not None:
            requests = read_trace(self.trace, self.count)
            prompts = [self._traced(index, request) for index, request in enumerate(requests)]
            outputs = [max(1, request.output_tokens // self.length_divisor) for request in requests]
            times = [request.arrival for request in requests]
        else:
            lengths = [
                (self.prompt.draw(random), self.output.draw(random)) for _ in range(self.count)
            ]
            prompts = [self._drawn(index, n, random) for index, (n, _) in enumerate(lengths)]
            outputs = [n for _, n in lengths]
            times = []
        arrivals = self._arrivals(times, len(prompts))
        return [
            Item(arrival, self._cut(segments, output), output)
            for arrival, segments, output in zip(arrivals, prompts, outputs, strict=True)
        ]

    def _arrivals(self, times: list[float], count: int) -> Iterator[float]:
        if times and self.variation is None:
            return iter(rescaled(times, self.rate))
        if self.rate is None:
            return at_once(count)
        variation = 1.0 if self.variation is None else self.variation
        random = Random(f"{self.seed} arrivals")
        return itertools.islice(renewal(self.rate, variation, random), count)

    def _drawn(self, index: int, length: int, random: Random) -> list[Segment]:
        if not self.prefix_groups:
            return [Segment(f"{self.seed} own {index}", length)]
        group = random.randrange(self.prefix_groups)
        shared = round(length * self.prefix_share)
        return _segments(
            (f"{self.seed} group {group}", shared), (f"{self.seed} own {index}", length - shared)
        )

    def _traced(self, index: int, request: Request) -> list[Segment]:
        """Blocks named alike are alike; the tokens that no whole block holds are the prompt's."""
        length = max(1, request.prompt_tokens // self.length_divisor)
        block = max(1, PREFIX_TOKENS // self.length_divisor)
        named = request.prefix[: length // block]
        blocks = [(f"{self.seed} block {number}", block) for number in named]
        rest = length - block * len(named)
        return _segments(*blocks, (f"{self.seed} own {index}", rest))

    def _cut(self, segments: list[Segment], output: int) -> tuple[Segment, ...]:
        if self.max_len is None:
            return tuple(segments)
        room, kept = self.max_len - output, []
        if room < 1:
            raise ConfigError(f"{output} output tokens leave no prompt within {self.max_len}")
        for segment in segments:
            kept.append((segment.key, min(segment.length, room)))
            room -= kept[-1][1]
        return tuple(_segments(*kept))


def parse_lengths(text: str, sharegpt: Lengths) -> Draw:
    """``512``, ``128-1024`` (uniform), ``lognormal:MEAN:CV``, or ``sharegpt``, which is given.

    Raises ConfigError for anything else.
    """
    if text == "sharegpt":
        return sharegpt
    if text.isdecimal() and int(text) > 0:
        return Uniform(int(text), int(text))
    if (match := _UNIFORM.fullmatch(text)) and 0 < int(match[1]) <= int(match[2]):
        return Uniform(int(match[1]), int(match[2]))
    if match := _LOGNORMAL.fullmatch(text):
        try:
            mean, variation = float(match[1]), float(match[2])
        except ValueError:
            mean = variation = 0.0
        if mean > 0:
            return Lengths(mean, variation)
    raise ConfigError(f"lengths {text!r}: use 512, 128-1024, lognormal:MEAN:CV or sharegpt")


def _segments(*pieces: tuple[str, int]) -> list[Segment]:
    return [Segment(key, length) for key, length in pieces if length]
