"""What a running router tells (``GET /admin/workload``, ``/admin/workers``), as the planner's own.

Raises ConfigError, in words for the operator, when there is too little to plan from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from statistics import mean, median, quantiles
from typing import Any, NamedTuple

from planner.outcome import Outcome
from planner.placement import Placement
from planner.workload import Request
from protocol.errors import ConfigError

FEWEST = 20  # sequences that say anything about a workload
LATENCIES = 32  # shares of all transfers with one latency each
MOST_BLOCKS = 64  # of a mean prompt: a simulation's time grows with them


class Row(NamedTuple):
    """A row of ``/admin/workload``. ``ttft`` None: no token; ``tpot`` None: fewer than two."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft: float | None
    tpot: float | None
    overhead: float | None = None  # of the ttft: neither waiting for resources nor computing
    transfer: float | None = None  # from the first token until decode had the KV


def requests_of(rows: Sequence[Row]) -> list[Request]:
    """The same requests for a simulation.

    What was turned away or failed came all the same: it counts with the mean output of the others.
    """
    outputs = [row.output_tokens for row in rows if row.ttft is not None]
    if len(outputs) < FEWEST:
        seen = f"only {len(outputs)} requests were" if len(outputs) != 1 else "only 1 request was"
        raise ConfigError(f"{seen} served in this time: {FEWEST} are needed to predict anything")
    if rows[0].arrival == rows[-1].arrival:
        raise ConfigError("all requests came at the same time: that is no workload")
    usual = max(1, round(mean(outputs)))
    return [
        Request(
            row.arrival,
            row.prompt_tokens,
            max(1, row.output_tokens) if row.ttft is not None else usual,
            cached_tokens=row.cached_tokens,
        )
        for row in rows
    ]


def overhead_of(rows: Sequence[Row]) -> float:
    """The usual overhead of a request, in seconds; 0 where none was told."""
    told = [row.overhead for row in rows if row.overhead is not None]
    return max(0.0, median(told)) if told else 0.0


def link_latencies_of(
    rows: Sequence[Row], chunk: int, second_per_token: float
) -> tuple[float, ...]:
    """Quantiles of what transfers took beside the bytes of a prompt's last chunk, in seconds.

    ``chunk`` is the longest in tokens. Empty where hardly anything was transferred.
    """
    told = [
        row.transfer - min(chunk, row.prompt_tokens - row.cached_tokens) * second_per_token
        for row in rows
        if row.transfer is not None
    ]
    if len(told) < FEWEST:
        return ()
    return tuple(max(0.0, seconds) for seconds in quantiles(told, n=LATENCIES, method="inclusive"))


def outcome_of(rows: Sequence[Row]) -> Outcome:
    """What the clients measured. A request without an answer counts as rejected."""
    outcome = Outcome()
    for row in rows:
        if row.ttft is None:
            outcome.num_rejected += 1
        else:
            outcome.add(row.ttft, row.tpot or 0.0)
    return outcome


def repeated(requests: Sequence[Request], num: int) -> list[Request]:
    """The last ``num`` requests; of fewer, all again and again, a mean gap between two rounds."""
    requests = requests[-num:]
    span = requests[-1].arrival - requests[0].arrival
    period = span * len(requests) / (len(requests) - 1)
    rounds = (
        replace(request, arrival=request.arrival + turn * period)
        for turn in count()
        for request in requests
    )
    return list(islice(rounds, num))


def placement_of(
    workers: Sequence[dict[str, Any]], prompt_tokens: float, local_prefill_tokens: int = 0
) -> Placement:
    """The pools that serve now, with their limits; without prefill workers decode is colocated.

    ``prompt_tokens`` is the mean length: KV blocks are enlarged where prompts have very many.
    ``local_prefill_tokens`` is the longest prompt that decode computes itself.
    """
    loads = {
        role: [w["load"] for w in workers if w["role"] == role and w["state"] == "serving"]
        for role in ("prefill", "decode")
    }
    prefill, decode = loads["prefill"], loads["decode"]
    if not decode:
        raise ConfigError("no decode worker serves")
    block_size = next(w["block_size"] for w in workers)
    while prompt_tokens > block_size * MOST_BLOCKS:
        block_size *= 2
    limits = Placement(
        colocated=len(decode),
        max_num_batched_tokens=(prefill or decode)[0]["max_num_batched_tokens"],
        max_num_seqs=decode[0]["max_num_seqs"],
        block_size=block_size,
    )
    return limits.with_pools(len(prefill), len(decode), local_prefill_tokens)
