"""Policies of the router side by side on a trace, in the simulator, and what the index costs.

    python -m bench.routing policies TRACE --rate 16 --kv-tokens 400000
    python -m bench.routing skew
    python -m bench.routing bursts
    python -m bench.routing index

The simulator runs the router's own policy over real block pools (docs/decisions/0012). ``ideal``
is one LRU cache as large as the pool's together, through which every prompt passes in order.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from engine.block_pool import BlockPool
from engine.cache_feed import CacheFeed
from engine.sequence import Sequence as Prompt
from planner.job import Job, new_job
from planner.outcome import Outcome
from planner.placement import Placement
from planner.profile import PUBLISHED, WorkerProfile
from planner.routing import RouterPolicy, Workers
from planner.simulator import simulate
from planner.workload import PREFIX_TOKENS, Lengths, Request, at_rate, generate, read_trace
from protocol.hashing import HASH_BYTES
from router.cached_blocks import CachedBlocks
from router.policy import POLICIES, PolicyName

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class _Counting(RouterPolicy):
    """Counts the prompt tokens of each prefill and the sequences of each decode worker."""

    def __init__(
        self, placement: Placement, profile: WorkerProfile, policy: PolicyName = "prefix-aware"
    ) -> None:
        super().__init__(placement, profile, policy)
        self.prompt_tokens = Counter(dict.fromkeys(range(placement.prefill), 0))
        self.sequences = Counter(dict.fromkeys(range(placement.decode), 0))

    def choose(self, job: Job, now: float) -> Workers | None:
        """See ``Route``."""
        chosen = super().choose(job, now)
        if chosen is not None:
            assert chosen[0] is not None, "decode has no prompts of its own here"
            self.prompt_tokens[chosen[0]] += job.request.prompt_tokens
            self.sequences[chosen[1]] += 1
        return chosen


def _run(
    requests: Sequence[Request], placement: Placement, profile: WorkerProfile, policy: PolicyName
) -> tuple[Outcome, _Counting]:
    route = _Counting(placement, profile, policy)
    outcome = simulate(requests, placement, profile, detail="fast", route=lambda *_: route)
    return outcome, route


def spread(loads: Sequence[float]) -> float:
    """The most loaded worker's share, in means."""
    return max(loads) * len(loads) / max(1, sum(loads))


def ideal_hits(prompts: Iterable[Prompt], num_blocks: int, block_size: int) -> float:
    """Share of prompt tokens that one LRU cache of that size would find, one after the other."""
    pool = BlockPool(num_blocks, block_size)
    for prompt in prompts:
        if pool.reserve(prompt, prompt.num_cacheable):
            prompt.num_computed = prompt.num_tokens
            pool.publish(prompt, 0)
            pool.release_sequence(prompt)
    return pool.prefix_hits / max(1, pool.prefix_queries)


def _table(title: str) -> Table:
    columns = "policy", "hits", "TTFT ms p50", "p90", "p99", "max/mean prompt tokens", "sequences"
    return Table(*columns, title=title)


def _row(policy: str, outcome: Outcome, route: _Counting) -> list[str]:
    ttft = [f"{np.percentile(outcome.ttft, p) * 1e3:.0f}" for p in (50, 90, 99)]
    hits = f"{outcome.cached_tokens / outcome.prompt_tokens:.1%}"
    return [
        policy,
        hits,
        *ttft,
        f"{spread(list(route.prompt_tokens.values())):.2f}",
        f"{spread(list(route.sequences.values())):.2f}",
    ]


@app.command()
def policies(
    trace: Annotated[Path, typer.Argument(help="Mooncake's JSON lines.")],
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 8.0,
    limit: Annotated[int, typer.Option(help="Requests, from the trace's begin.")] = 2000,
    prefill: int = 4,
    decode: int = 4,
    kv_tokens: Annotated[int, typer.Option(help="KV tokens of a worker; 0: its profile's.")] = 0,
    profile: str = "h200-llama-3.1-8b",
) -> None:
    """Hit rate, TTFT and balance of each policy on one trace."""
    worker = WorkerProfile.load(profile)
    if kv_tokens:
        worker = worker.model_copy(update={"kv_tokens": kv_tokens})
    requests = list(at_rate(read_trace(trace, limit), rate))
    placement = Placement(prefill=prefill, decode=decode, block_size=PREFIX_TOKENS)
    prompts = (
        new_job(number, request, PREFIX_TOKENS).sequence for number, request in enumerate(requests)
    )
    ideal = ideal_hits(prompts, prefill * worker.kv_tokens // PREFIX_TOKENS, PREFIX_TOKENS)
    table = _table(f"{trace.name}: {len(requests)} requests, {rate:g}/s, ideal hits {ideal:.1%}")
    for policy in POLICIES:
        table.add_row(*_row(policy, *_run(requests, placement, worker, policy)))
    Console().print(table)


@app.command()
def skew(rate: float = 60.0, count: int = 6000, workers: int = 4) -> None:
    """Balance where nothing is shared, and with 80 % of the requests on one prefix."""
    worker, placement = PUBLISHED["h200-llama-3.1-8b"], Placement(prefill=workers, decode=workers)
    prompt, output = Lengths(3000, 0.5), Lengths(100, 0.5)
    apart = list(generate(rate=rate, count=count, prompt=prompt, output=output))
    random = Random(0)
    hot = tuple(range(4))  # the first 2048 tokens
    shared = [
        Request(r.arrival, r.prompt_tokens, r.output_tokens, hot if random.random() < 0.8 else ())
        for r in apart
    ]
    for title, requests in (("nothing shared", apart), ("80 % share a prefix of 2048", shared)):
        table = _table(f"{title}, {rate:g} requests/s")
        for policy in POLICIES:
            table.add_row(*_row(policy, *_run(requests, placement, worker, policy)))
        Console().print(table)


@app.command()
def bursts(rate: float = 4.0, count: int = 150, size: int = 8, workers: int = 4) -> None:
    """``rate`` times a second ``size`` requests at once, all but 100 of their tokens alike."""
    worker, placement = PUBLISHED["h200-llama-3.1-8b"], Placement(prefill=workers, decode=workers)
    shared, own = 8, 100  # blocks and tokens
    one = Lengths(shared * PREFIX_TOKENS + own, 0.0)
    requests = [
        replace(request, prefix=tuple(range(number * shared, (number + 1) * shared)))
        for number, request in enumerate(
            generate(rate=rate, count=count, prompt=one, output=Lengths(100, 0.0))
        )
        for _ in range(size)
    ]
    table = _table(f"{size} requests at once with a prefix of {shared * PREFIX_TOKENS}, {rate:g}/s")
    for policy in POLICIES:
        table.add_row(*_row(policy, *_run(requests, placement, worker, policy)))
    Console().print(table)


@app.command()
def index(blocks: int = 1_000_000) -> None:
    """What the router's index and a worker's feed cost, by block."""
    random = Random(0)
    names = [random.randbytes(HASH_BYTES) for _ in range(blocks)]
    pool = BlockPool(blocks, 16)
    feed = CacheFeed(pool)
    began = time.process_time()
    for block, name in enumerate(names):
        pool.name(block, name)
    with_feed = time.process_time() - began
    bare = BlockPool(blocks, 16)
    began = time.process_time()
    for block, name in enumerate(names):
        bare.name(block, name)
    without = time.process_time() - began
    began = time.process_time()
    messages = []
    while (message := feed.take()) is not None:
        messages.append(message)
    taking = time.process_time() - began
    tracemalloc.start()
    cached = CachedBlocks()
    began = time.process_time()
    for message in messages:
        cached.apply(message)
    applying = time.process_time() - began
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    keys = list(islice(cached.keys, 1000))
    began = time.process_time()
    for _ in range(100):
        cached.leading(keys)
    looking = (time.process_time() - began) / 100
    sent = sum(len(message.stored) for message in messages)
    table = Table(f"{len(cached.keys):,} blocks", "")
    table.add_row("router memory", f"{memory / 2**20:.0f} MiB, {memory / blocks:.0f} bytes a block")
    table.add_row("router, apply (traced)", f"{applying / blocks * 1e9:.0f} ns a block")
    table.add_row("router, match of 1000 blocks", f"{looking * 1e6:.0f} us a worker")
    table.add_row("worker, on each stored block", f"{(with_feed - without) / blocks * 1e9:.0f} ns")
    table.add_row("worker, to take the messages", f"{taking / blocks * 1e9:.0f} ns a block")
    table.add_row("sent", f"{sent / 2**20:.1f} MiB in {len(messages)} messages")
    Console().print(table)


if __name__ == "__main__":
    app()
