"""The simulator against what is known: theory, published figures, real traces.

    python -m bench.simulator theory
    python -m bench.simulator scale --requests 1000000 --workers 1000
    python -m bench.simulator published PERF_FOLDER
    python -m bench.simulator cache TRACE --capacity 3000000
    python -m bench.simulator policies TRACE --rate 2

``published`` wants the folder of tables that came with DistServe's and splitwise-sim's
repositories; traces are Mooncake's and Azure's. Each writes its part of
bench/results/simulator.json.
"""

from __future__ import annotations

import csv
import resource
import statistics
import time
from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.results_file import record
from engine.block_pool import BlockPool
from planner.job import Job, block_names, new_job
from planner.latency import DecodeFit, LinearLatency, PrefillFit, interpolate
from planner.placement import Placement
from planner.profile import PUBLISHED, WorkerProfile
from planner.routing import LeastLoaded
from planner.simulator import simulate
from planner.workload import PREFIX_TOKENS, Lengths, at_rate, generate, read_trace

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

RESULTS = Path(__file__).parent / "results" / "simulator.json"

TraceFile = Annotated[Path, typer.Argument(help="Mooncake's JSON lines or Azure's CSV.")]


@app.command()
def theory() -> None:
    """Mean wait of a lone prefill worker with equal prompts, beside the M/D/1 formula."""
    service = 16e-3
    latency = LinearLatency(
        prefill=PrefillFit(fixed=service, per_token=0, per_square=0),
        decode=DecodeFit(fixed=service, per_context=0, per_row=0),
    )
    changes = {"latency": latency, "kv_tokens": 1024}
    profile = PUBLISHED["h200-llama-3.1-8b"].model_copy(update=changes)
    placement = Placement(prefill=1, decode=1, max_num_seqs=4, block_size=16)
    table = Table("load", "simulated ms", "formula ms", "off by")
    found = {}
    for load in (0.2, 0.4, 0.6, 0.8):
        requests = generate(
            rate=load / service, count=200_000, prompt=Lengths(16), output=Lengths(1)
        )
        wait = float(simulate(requests, placement, profile).ttft.mean()) - service
        formula = load * service / (2 * (1 - load))
        found[str(load)] = {"simulated_wait": wait, "formula": formula}
        figures = [f"{wait * 1e3:.3f}", f"{formula * 1e3:.3f}", f"{wait / formula - 1:+.2%}"]
        table.add_row(f"{load}", *figures)
    Console().print(table)
    record(RESULTS, "md1", found)


@app.command()
def scale(requests: int = 1_000_000, workers: int = 1000) -> None:
    """Processor time and memory of one large simulation."""
    placement = Placement(prefill=workers // 2, decode=workers - workers // 2, block_size=512)
    arrivals = generate(
        rate=15 * workers, count=requests, prompt=Lengths(1155, 1), output=Lengths(211, 1)
    )
    outcome = simulate(arrivals, placement, PUBLISHED["h200-llama-3.1-8b"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.process_time()
    Console().print(
        f"{len(outcome.ttft)} requests, {workers} workers: {seconds:.0f} s of processor time, "
        f"{memory:.0f} MiB at most"
    )
    found = {"requests": len(outcome.ttft), "workers": workers, "cpu_seconds": round(seconds)}
    record(RESULTS, "scale", {**found, "peak_mib": round(memory), **outcome.figures()})


@app.command()
def published(folder: Path) -> None:
    """Each inner point of published tables, interpolated from its neighbours."""
    curves: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "splitwise-sim" / "perf_model.csv"):
        if row["hardware"].endswith("-pcap"):  # not measured
            continue
        of = row["model"], row["hardware"], f"tp{row['tensor_parallel']}"
        prompt, batch = int(row["prompt_size"]), int(row["batch_size"])
        if batch == 1:
            curves["prompt", *of][prompt].append(float(row["prompt_time"]))
        if prompt == 512:
            curves["token by batch", *of][batch].append(float(row["token_time"]))
    for row in _rows(folder / "h200_llama3.1-8b_bf16_lower_bound.csv"):
        curves[f"{row['phase']} by context", f"batch {row['batch']}"][int(row["ctx"])].append(
            float(row["total_ms"])
        )
    errors = defaultdict(list)
    for name, points in curves.items():
        xs = sorted(points)
        ys = [statistics.median(points[x]) for x in xs]
        for i in range(1, len(xs) - 1):
            left = interpolate([*xs[:i], *xs[i + 1 :]], [*ys[:i], *ys[i + 1 :]], xs[i])
            errors[name[0]].append(abs(left / ys[i] - 1))
    table = Table("curve", "points left out", "median error", "largest")
    for kind, found in errors.items():
        table.add_row(kind, str(len(found)), f"{statistics.median(found):.1%}", f"{max(found):.1%}")
    Console().print(table)
    kinds = {
        kind: {"median": statistics.median(e), "largest": max(e)} for kind, e in errors.items()
    }
    record(RESULTS, "interpolation_error", kinds)


@app.command()
def cache(
    trace: TraceFile, capacity: Annotated[list[int], typer.Option(help="Tokens of KV.")]
) -> None:
    """Hits of one prefix cache, the real block pool, beside those of an unbounded one."""
    requests = read_trace(trace)
    most = sum(len(request.prefix) + 1 for request in requests)
    hits = {}
    for blocks in [*(tokens // PREFIX_TOKENS for tokens in capacity), most]:
        pool = BlockPool(blocks, PREFIX_TOKENS)
        for number, request in enumerate(requests):
            sequence = new_job(number, request, PREFIX_TOKENS).sequence
            if pool.reserve(sequence, request.prompt_tokens):
                known, sequence.num_computed = sequence.num_computed, request.prompt_tokens
                pool.publish(sequence, known)
                pool.release_sequence(sequence)
        hits[blocks] = pool.prefix_hits
    table = Table("capacity, tokens", "of the most hits", "of all prompt tokens")
    total = sum(request.prompt_tokens for request in requests)
    for blocks, found in hits.items():
        name = f"{blocks * PREFIX_TOKENS:,}" if blocks != most else "unbounded"
        table.add_row(name, f"{found / hits[most]:.1%}", f"{found / total:.1%}")
    Console().print(table)
    shares = {str(blocks * PREFIX_TOKENS): found / hits[most] for blocks, found in hits.items()}
    record(RESULTS, f"hits_of_the_most_{trace.stem}", shares)


class RandomRoute(LeastLoaded):
    """Any worker."""

    def __init__(self, placement: Placement, profile: WorkerProfile) -> None:
        super().__init__(placement, profile)
        self._random = Random(0)

    def prefill_for(self, job: Job) -> int:
        """A prefill worker by chance."""
        return self._random.randrange(len(self.prompts.num))


class CacheAware(LeastLoaded):
    """The prefill worker with the fewest tokens to compute: queued ones and the prompt's own.

    What each worker has cached is taken to be all that it was ever given.
    """

    def __init__(self, placement: Placement, profile: WorkerProfile) -> None:
        super().__init__(placement, profile)
        self._given: list[set[bytes]] = [set() for _ in self.prompts.num]

    def prefill_for(self, job: Job) -> int:
        """A prefill worker by its queue and its cache."""
        names = block_names(job.number, job.request, PREFIX_TOKENS)

        def work(index: int) -> int:
            known = takewhile(self._given[index].__contains__, names)
            return self.prompts.tokens[index] - PREFIX_TOKENS * sum(1 for _ in known)

        best = min(range(len(self._given)), key=work)
        self._given[best].update(names)
        return best


@app.command()
def policies(
    trace: TraceFile,
    rate: Annotated[float, typer.Option(help="Requests a second.")],
    prefill: int = 8,
    decode: int = 8,
    profile: str = "h200-llama-3.1-8b",
) -> None:
    """Mean TTFT by routing policy: Mooncake's order is random, load, cache (FAST '25)."""
    requests = read_trace(trace)
    placement = Placement(prefill=prefill, decode=decode, block_size=512)
    table = Table("policy", "mean TTFT s", "p90 s", "prompt tokens from cache")
    means = {}
    for name, route in (("random", RandomRoute), ("load", LeastLoaded), ("cache", CacheAware)):
        arrivals = at_rate(requests, rate)
        outcome = simulate(arrivals, placement, WorkerProfile.load(profile), route=route)
        share = outcome.cached_tokens / outcome.prompt_tokens
        ttft = outcome.ttft.mean(), outcome.figures()["ttft_p90"]
        means[name] = float(ttft[0])
        table.add_row(name, *(f"{value:.3f}" for value in ttft), f"{share:.1%}")
    Console().print(table)
    record(RESULTS, "mean_ttft_by_policy", {"trace": trace.stem, "rate": rate, **means})


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    app()
