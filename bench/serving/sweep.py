"""The knee: the highest rate at which an SLO holds, by doubling and then bisection."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

MAX_DOUBLINGS = 10


async def find_knee(
    holds: Callable[[float], Awaitable[bool]], start: float, tolerance: float
) -> float | None:
    """Requests a second, within a factor of ``1 + tolerance``; None when no rate tried holds.

    ``holds`` measures a rate; each is asked for once. Rates double from ``start`` while the SLO
    holds, or halve until it does, then their geometric middle is tried. Measured points scatter:
    near the knee an answer may be chance, and the result is one crossing. After MAX_DOUBLINGS
    without a miss the last rate is the answer, a lower bound.
    """
    low = high = start
    if await holds(start):
        for _ in range(MAX_DOUBLINGS):
            high = low * 2
            if not await holds(high):
                break
            low = high
        else:
            return low
    else:
        for _ in range(MAX_DOUBLINGS):
            low = high / 2
            if await holds(low):
                break
            high = low
        else:
            return None
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if await holds(middle):
            low = middle
        else:
            high = middle
    return low
