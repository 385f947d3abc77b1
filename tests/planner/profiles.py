"""Worker profiles whose steps can be timed by hand."""

from __future__ import annotations

from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.profile import Link, WorkerProfile


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
