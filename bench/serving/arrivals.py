"""When requests arrive: seconds from the run's start, never falling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random


def renewal(rate: float, variation: float, random: Random) -> Iterator[float]:
    """Arrivals without end at ``rate`` a second; the first one at zero.

    Gaps are independent and Gamma distributed with coefficient of variation ``variation``: 0 is a
    constant gap, 1 a Poisson process, more comes in bursts. vLLM's ``--burstiness`` is the shape
    of the same distribution, ``1 / variation**2``.
    """
    now = 0.0
    while True:
        yield now
        if variation == 0:
            now += 1 / rate
        else:
            shape = 1 / variation**2
            now += random.gammavariate(shape, 1 / (rate * shape))


def at_once(count: int) -> Iterator[float]:
    """``count`` arrivals at zero: a closed loop, whose own ends say when the next one starts."""
    return itertools.repeat(0.0, count)


def rescaled(times: Sequence[float], rate: float | None) -> list[float]:
    """A trace's times from zero, divided so that they come at ``rate`` a second; None: as it is.

    Bursts stay what they are. At least two different times.
    """
    start, span = times[0], times[-1] - times[0]
    factor = 1.0 if rate is None else (len(times) - 1) / span / rate
    return [(time - start) * factor for time in times]
