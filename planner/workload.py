"""Requests over time, from traces or from distributions. Arrivals are in seconds from zero."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from random import Random

from protocol.errors import ConfigError

PREFIX_TOKENS = 512  # of one prefix id, as in Mooncake's traces
COARSE_TIMESTAMPS = 1000  # ms: a trace whose times are multiples of more gets them spread
TOLERANCE = 10  # milliseconds by which a time may lie beside its grid

_AZURE_COLUMNS = {"arrival_s", "input_tokens", "output_tokens"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Equal leading ``prefix`` ids mean equal blocks of PREFIX_TOKENS tokens.

    ``cached_tokens`` of the prompt are in the cache of whichever worker prefills it.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Of its sequence at the end: prompt and output."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts of a mean and a coefficient of variation (0: all equal)."""

    mean: float
    variation: float = 0.0

    def draw(self, random: Random) -> int:
        """One count, at least 1."""
        variance = math.log(1 + self.variation**2)
        value = random.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return max(1, round(value))


def generate(
    *,
    rate: float,
    count: int,
    prompt: Lengths,
    output: Lengths,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Iterator[Request]:
    """``count`` requests at ``rate`` a second, one at a time: memory does not grow with them.

    Gaps between arrivals are Gamma distributed with coefficient of variation ``burstiness``; 1 is
    a Poisson process.
    """
    random = Random(seed)
    shape = 1 / burstiness**2
    now = 0.0
    for _ in range(count):
        now += random.gammavariate(shape, 1 / (rate * shape))
        yield Request(now, prompt.draw(random), output.draw(random))


def rate_of(requests: Sequence[Request]) -> float:
    """Mean requests a second. At least two requests, at different times."""
    return (len(requests) - 1) / (requests[-1].arrival - requests[0].arrival)


def at_rate(requests: Sequence[Request], rate: float) -> Iterator[Request]:
    """The same requests, times divided so that they come at ``rate`` a second: bursts stay."""
    factor, start = rate_of(requests) / rate, requests[0].arrival
    for request in requests:
        yield replace(request, arrival=(request.arrival - start) * factor)


def prompt_lengths(requests: Sequence[Request]) -> list[int]:
    """What a quarter, half, three quarters and all of the prompts do not exceed, and 0; in order.

    In tokens, without those that are known to be cached.
    """
    lengths = sorted(request.prompt_tokens - request.cached_tokens for request in requests)
    return sorted({0, *(lengths[(len(lengths) * part - 1) // 4] for part in (1, 2, 3, 4))})


def read_trace(path: Path, limit: int | None = None) -> list[Request]:
    """The first ``limit`` requests of a trace in Mooncake's JSON lines or Azure's CSV columns.

    Azure: ``arrival_s,input_tokens,output_tokens``. Mooncake: ``timestamp`` (ms), ``input_length``,
    ``output_length``, ``hash_ids``; where all times are multiples of a second or more they are
    spread evenly at random within it. Raises ConfigError naming the line at fault.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    requests = _read_mooncake(path, text) if text.startswith("{") else _read_azure(path, text)
    requests.sort(key=lambda request: request.arrival)
    requests = requests[:limit]
    if len(requests) < 2 or requests[0].arrival == requests[-1].arrival:
        raise ConfigError(f"the trace {path} needs two requests at different times")
    return requests


def _read_azure(path: Path, text: str) -> list[Request]:
    lines = csv.DictReader(text.splitlines())
    if not _AZURE_COLUMNS.issubset(lines.fieldnames or ()):
        raise ConfigError(f"{path}: expected the columns {', '.join(sorted(_AZURE_COLUMNS))}")
    return [
        _request(path, line, row["arrival_s"], row["input_tokens"], row["output_tokens"], ())
        for line, row in enumerate(lines, start=2)
    ]


def _read_mooncake(path: Path, text: str) -> list[Request]:
    requests = []
    for line, source in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(source)
            fields = row["timestamp"], row["input_length"], row["output_length"]
            prefix = tuple(int(number) for number in row.get("hash_ids", ()))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}, line {line}: {error!r}") from error
        requests.append(_request(path, line, *fields, prefix))
    return _spread(requests)


def _request(
    path: Path, line: int, arrival: object, prompt: object, output: object, prefix: Iterable[int]
) -> Request:
    try:
        request = Request(float(str(arrival)), int(str(prompt)), int(str(output)), tuple(prefix))
    except ValueError as error:
        raise ConfigError(f"{path}, line {line}: {error}") from error
    if not (math.isfinite(request.arrival) and request.prompt_tokens > 0):
        raise ConfigError(f"{path}, line {line}: a finite time and a prompt are needed")
    return replace(request, output_tokens=max(1, request.output_tokens))


def _spread(requests: list[Request]) -> list[Request]:
    """Milliseconds to seconds; times on a coarse grid are spread over its cells, seeded."""
    near = (round(request.arrival / TOLERANCE) * TOLERANCE for request in requests)
    step = reduce(math.gcd, near, 0)
    random = Random(0)
    width = step if step >= COARSE_TIMESTAMPS else 0
    return [
        replace(request, arrival=(request.arrival + random.random() * width) / 1e3)
        for request in requests
    ]
