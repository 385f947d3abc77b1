"""The simulator and the planner against what is known: theory, published figures, real traces.

    python -m bench.planner theory
    python -m bench.planner scale --requests 1000000 --workers 1000
    python -m bench.planner published PERF_FOLDER
    python -m bench.planner cache TRACE --capacity 3000000
    python -m bench.planner policies TRACE --rate 2
    python -m bench.planner ratios TRACE [TRACE ...] --slo-ttft 1000 --slo-tpot 10
    python -m bench.planner crossover --profile a100-opt-13b --gpus 2
    python -m bench.planner autopilot TRACE --slo-ttft 2000 --slo-tpot 100 --rate 3 --rate 4

``published`` wants the folder of tables that came with DistServe's and splitwise-sim's
repositories; traces are Mooncake's and Azure's.
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
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from engine.block_pool import BlockPool
from planner.autopilot import predictor
from planner.autopilot_terms import Limits, Pools
from planner.elastic import ElasticRoute
from planner.goodput import Candidate
from planner.job import Job, block_names, new_job
from planner.latency import DecodeFit, LinearLatency, PrefillFit, interpolate
from planner.outcome import Slo
from planner.placement import Placement
from planner.plan import BUDGETS, Planner
from planner.profile import PUBLISHED, WorkerProfile
from planner.routing import LeastLoaded
from planner.simulator import simulate
from planner.workload import PREFIX_TOKENS, Lengths, at_rate, generate, read_trace

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

TraceFile = Annotated[Path, typer.Argument(help="Mooncake's JSON lines or Azure's CSV.")]
Profile = Annotated[str, typer.Option(help="A published profile or a profile's file.")]


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
    for load in (0.2, 0.4, 0.6, 0.8):
        requests = generate(
            rate=load / service, count=200_000, prompt=Lengths(16), output=Lengths(1)
        )
        wait = float(simulate(requests, placement, profile).ttft.mean()) - service
        formula = load * service / (2 * (1 - load))
        figures = [f"{wait * 1e3:.3f}", f"{formula * 1e3:.3f}", f"{wait / formula - 1:+.2%}"]
        table.add_row(f"{load}", *figures)
    Console().print(table)


@app.command()
def scale(requests: int = 1_000_000, workers: int = 1000) -> None:
    """Processor time and memory of one large simulation."""
    placement = Placement(prefill=workers // 2, decode=workers - workers // 2, block_size=512)
    arrivals = generate(
        rate=15 * workers, count=requests, prompt=Lengths(1155, 1), output=Lengths(211, 1)
    )
    outcome = simulate(arrivals, placement, PUBLISHED["h200-llama-3.1-8b"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {name: f"{value * 1e3:.1f}" for name, value in outcome.figures().items()}
    Console().print(
        f"{len(outcome.ttft)} requests, {workers} workers: {time.process_time():.0f} s of "
        f"processor time, {memory:.0f} MiB at most; ms: {figures}"
    )


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
        name = f"{row['phase']} by context", f"batch {row['batch']}"
        curves[name][int(row["ctx"])].append(float(row["total_ms"]))
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
            sequence = new_job(number, request, PREFIX_TOKENS, disaggregated=False).sequence
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


class RandomRoute(LeastLoaded):
    """Any worker."""

    def __init__(self, placement: Placement, profile: WorkerProfile) -> None:
        super().__init__(placement, profile)
        self._random = Random(0)

    def prefill_for(self, job: Job) -> int:
        """A prefill worker by chance."""
        return self._random.randrange(len(self.queued))


class CacheAware(LeastLoaded):
    """The prefill worker with the fewest tokens to compute: queued ones and the prompt's own.

    What each worker has cached is taken to be all that it was ever given.
    """

    def __init__(self, placement: Placement, profile: WorkerProfile) -> None:
        super().__init__(placement, profile)
        self._given: list[set[bytes]] = [set() for _ in self.queued]

    def prefill_for(self, job: Job) -> int:
        """A prefill worker by its queue and its cache."""
        names = block_names(job.number, job.request, PREFIX_TOKENS)

        def work(index: int) -> int:
            known = takewhile(self._given[index].__contains__, names)
            return self.queued[index] - PREFIX_TOKENS * sum(1 for _ in known)

        best = min(range(len(self.queued)), key=work)
        self._given[best].update(names)
        return best


@app.command()
def policies(
    trace: TraceFile,
    rate: Annotated[float, typer.Option(help="Requests a second.")],
    prefill: int = 8,
    decode: int = 8,
    profile: Profile = "h200-llama-3.1-8b",
) -> None:
    """Mean TTFT by routing policy: Mooncake's order is random, load, cache (FAST '25)."""
    requests = read_trace(trace)
    placement = Placement(prefill=prefill, decode=decode, block_size=512)
    table = Table("policy", "mean TTFT s", "p90 s", "prompt tokens from cache")
    for name, route in (("random", RandomRoute), ("load", LeastLoaded), ("cache", CacheAware)):
        arrivals = at_rate(requests, rate)
        outcome = simulate(arrivals, placement, WorkerProfile.load(profile), route=route)
        share = outcome.cached_tokens / outcome.prompt_tokens
        ttft = outcome.ttft.mean(), outcome.figures()["ttft_p90"]
        table.add_row(name, *(f"{value:.3f}" for value in ttft), f"{share:.1%}")
    Console().print(table)


@app.command()
def ratios(
    traces: list[Path],
    slo_ttft: Annotated[float, typer.Option(help="Milliseconds.")] = 1000,
    slo_tpot: Annotated[float, typer.Option(help="Milliseconds.")] = 10,
    gpus: int = 4,
    requests: int = 1500,
    profile: Profile = "h200-llama-3.1-8b",
) -> None:
    """The recommended pools beside the best of every ratio with every budget."""
    slo, worker = Slo(slo_ttft / 1e3, slo_tpot / 1e3), WorkerProfile.load(profile)
    table = Table("trace", "recommended", "requests/s", "best of all", "requests/s", "share")
    for trace in traces:
        workload = read_trace(trace, requests)
        found = Planner(workload, worker, gpus).best_pools(slo)
        every = {}
        for prefill in range(1, gpus):
            for budget in BUDGETS:
                placement = Placement(
                    prefill=prefill, decode=gpus - prefill, max_num_batched_tokens=budget
                )
                every[placement] = Candidate(workload, placement, worker).goodput(slo)
        best = max(every, key=lambda placement: every[placement])
        texts = str(found.placement), f"{found.goodput:.2f}", str(best), f"{every[best]:.2f}"
        share = f"{found.goodput / every[best]:.1%}" if every[best] else "none keeps the SLO"
        table.add_row(trace.stem, *texts, share)
    Console(width=120).print(table)


@app.command()
def crossover(
    profile: Annotated[Literal["a100-opt-13b", "h200-llama-3.1-8b"], typer.Option()],
    gpus: int = 4,
    requests: int = 3000,
) -> None:
    """Pools over colocation, by SLO: short prompts on one published profile, long on the other.

    The shorter the prompts, the more requests it takes until batches have settled.
    """
    workloads = {
        "a100-opt-13b": (Lengths(250, 1.0), Lengths(200, 1.0), (0.25,), (0.1, 0.03)),
        "h200-llama-3.1-8b": (Lengths(4000, 0.5), Lengths(200, 1.0), (0.5, 2.0), (0.05, 0.008)),
    }
    table = Table("TTFT ms", "TPOT ms", "pools / colocated", "pools", "colocated", title=profile)
    prompt, output, ttfts, tpots = workloads[profile]
    drawn = list(generate(rate=1, count=requests, prompt=prompt, output=output))
    planner = Planner(drawn, PUBLISHED[profile], gpus)
    for slo in (Slo(ttft, tpot) for ttft in ttfts for tpot in tpots):
        options = pools, colocated = planner.best_pools(slo), planner.best_colocated(slo)
        ratio = pools.goodput / colocated.goodput if colocated.goodput else float("inf")
        rates = (f"{option.placement}: {option.goodput:.2f}/s" for option in options)
        table.add_row(f"{slo.ttft * 1e3:g}", f"{slo.tpot * 1e3:g}", f"{ratio:.2f}", *rates)
    Console(width=120).print(table)


@app.command()
def autopilot(
    trace: TraceFile,
    rate: Annotated[list[float], typer.Option(help="Requests a second, the trace's mean.")],
    slo_ttft: Annotated[float, typer.Option(help="Milliseconds.")] = 2000,
    slo_tpot: Annotated[float, typer.Option(help="Milliseconds.")] = 100,
    gpus: int = 4,
    requests: int = 10_000,
    profile: Profile = "a100-opt-13b",
) -> None:
    """Requests within the SLO: of each static ratio, and of the autopilot begun at each of them."""
    slo, worker = Slo(slo_ttft / 1e3, slo_tpot / 1e3), WorkerProfile.load(profile)
    workload = read_trace(trace, requests)
    ratios = [Placement(prefill=p, decode=gpus - p) for p in range(1, gpus)]
    columns = [f"{p.prefill}P{p.decode}D" for p in ratios]
    table = Table("requests/s", "", *columns, title="share within the SLO (changes of the pools)")
    for at in rate:
        static, piloted = [], []
        for placement in ratios:
            outcome = simulate(at_rate(workload, at), placement, worker)
            static.append(f"{outcome.attainment(slo):.2%}")
            pools = Pools(placement.prefill, placement.decode)
            route = ElasticRoute(pools, worker, Limits(slo), predictor(worker, placement, slo))
            arrivals = at_rate(workload, at)
            outcome = simulate(
                arrivals, placement, worker, route=lambda *_, it=route: it, elastic=True
            )
            piloted.append(f"{outcome.attainment(slo):.2%} ({len(route.decisions)})")
        table.add_row(f"{at:g}", "static", *static)
        table.add_row("", "autopilot", *piloted)
    Console(width=120).print(table)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    app()
