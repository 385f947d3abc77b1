"""Worker profiles whose steps can be timed by hand, and steps timed by a model."""

from __future__ import annotations

from random import Random

from engine.batch import Batch, BatchRow
from engine.sequence import Sequence
from engine.step_sums import StepTimes
from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.profile import Link, WorkerProfile
from protocol.messages import Role
from protocol.sampling import SamplingParams


def profile(
    *,
    fixed: float = 0.0,
    per_token: float = 1e-3,
    per_square: float = 0.0,
    decode: tuple[float, float, float] = (10e-3, 0.0, 0.0),
    kv_tokens: int = 1 << 20,
    kv_bytes_per_token: int = 1,
    bytes_per_second: float = 1e12,
    link_latency: float = 0.0,
) -> WorkerProfile:
    """By default a prompt token takes 1 ms, a decode step 10 ms, a transfer nothing."""
    of_step, per_context, per_row = decode
    return WorkerProfile(
        name="by hand",
        latency=LinearLatency(
            prefill=PrefillFit(fixed=fixed, per_token=per_token, per_square=per_square),
            decode=DecodeFit(fixed=of_step, per_context=per_context, per_row=per_row),
        ),
        kv_tokens=kv_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
        link=Link(bytes_per_second=bytes_per_second, latency=link_latency),
    )


def batch(*rows: tuple[int, int]) -> Batch:
    """Rows of (start, number of tokens)."""
    return Batch(
        tuple(
            BatchRow(
                Sequence(str(i), [0] * (start + num), start + num, SamplingParams(max_tokens=1)),
                start,
                num,
            )
            for i, (start, num) in enumerate(rows)
        )
    )


def timed(role: Role, latency: LinearLatency, steps: int, noise: float = 0.0) -> StepTimes:
    """Steps of one kind, of many sizes, each off by up to ``noise``."""
    random, times = Random(role), StepTimes()
    for _ in range(steps):
        off = 1 + noise * random.uniform(-1, 1)
        if role == "prefill":
            num = random.randrange(16, 2000)
            times.add(batch((0, num)), off * latency.step_seconds(num, num * num, 0, 0))
        else:
            contexts = [random.randrange(100, 900) for _ in range(random.randrange(1, 40))]
            seconds = latency.step_seconds(0, 0, len(contexts), sum(contexts))
            times.add(batch(*((context - 1, 1) for context in contexts)), off * seconds)
    return times
