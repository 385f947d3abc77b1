"""The planner and the autopilot against every alternative, simulated.

    python -m bench.planner placements PERF_FOLDER
    python -m bench.planner ratios TRACE [TRACE ...] --slo-ttft 1000 --slo-tpot 10
    python -m bench.planner crossover
    python -m bench.planner autopilot TRACE --slo-ttft 2000 --slo-tpot 100 --rate 3 --rate 4

``placements`` wants the folder with DistServe's published fits; traces are Mooncake's and Azure's.
Each writes its part of bench/results/planner.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.results_file import record
from planner.autopilot import predictor
from planner.autopilot_terms import Limits
from planner.elastic import ElasticRoute
from planner.goodput import Candidate
from planner.latency import DecodeFit, LinearLatency, PrefillFit
from planner.outcome import Slo
from planner.placement import Placement
from planner.plan import BUDGETS, Planner
from planner.profile import PUBLISHED, WorkerProfile
from planner.simulator import simulate
from planner.workload import Lengths, Request, at_rate, generate, prompt_lengths, read_trace

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

RESULTS = Path(__file__).parent / "results" / "planner.json"

TraceFile = Annotated[Path, typer.Argument(help="Mooncake's JSON lines or Azure's CSV.")]
Profile = Annotated[str, typer.Option(help="A published profile or a profile's file.")]


@app.command()
def placements(folder: Path, requests: int = 1000) -> None:
    """DistServe's order, 2P1D before 1P1D before colocation (OSDI '24, figure 1), on both fits.

    OPT-13B on A100, 512 tokens in and 64 out, 0.4 s and 0.04 s. Goodput per GPU.
    """
    slo, workload = Slo(0.4, 0.04), _fixed(512, 64, requests)
    names = "prefill only", "decode only", "1P1D", "2P1D", "colocated"
    table = Table("fit of", *names)
    for engine in ("vllm", "distserve"):
        worker = _distserve_fit(folder / "distserve" / f"profiler-a100-80g.{engine}.json")

        def best(worker: WorkerProfile = worker, asked: Slo = slo, **pools: int) -> float:
            tried = (Placement(**pools, max_num_batched_tokens=budget) for budget in BUDGETS)
            return max(Candidate(workload, one, worker).goodput(asked) for one in tried)

        each = {
            "prefill only": best(asked=Slo(slo.ttft, 1e9), prefill=1, decode=6),
            "decode only": best(asked=Slo(1e9, slo.tpot), prefill=6, decode=1),
            "1P1D": best(prefill=1, decode=1) / 2,
            "2P1D": best(prefill=2, decode=1) / 3,
            "colocated": best(colocated=1),
        }
        table.add_row(engine, *(f"{each[name]:.2f}" for name in names))
        record(RESULTS, f"placements_{engine}", each)
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
    """The recommended pools beside the best of every ratio, budget and prompts on decode."""
    slo, worker = Slo(slo_ttft / 1e3, slo_tpot / 1e3), WorkerProfile.load(profile)
    table = Table("trace", "recommended", "requests/s", "best of all", "requests/s", "share")
    for trace in traces:
        workload = read_trace(trace, requests)
        found = Planner(workload, worker, gpus).best_pools(slo)
        every = {
            placement: Candidate(workload, placement, worker).goodput(slo)
            for placement in _all_pools(gpus, workload)
        }
        best = max(every, key=lambda placement: every[placement])
        texts = str(found.placement), f"{found.goodput:.2f}", str(best), f"{every[best]:.2f}"
        share = f"{found.goodput / every[best]:.1%}" if every[best] else "none keeps the SLO"
        table.add_row(trace.stem, *texts, share)
        figures = {"recommended": texts[0], "goodput": found.goodput, "slo": [slo.ttft, slo.tpot]}
        sweep = {"best": texts[2], "best_goodput": every[best], "tried": len(every)}
        record(RESULTS, f"ratios_{trace.stem}", {**figures, **sweep, "requests": requests})
    Console(width=140).print(table)


@app.command()
def crossover(gpus: int = 4, requests: int = 500) -> None:
    """Pools over the best colocated workers, by SLO: one map with short prompts, one with long.

    The shorter the prompts, the more requests it takes until batches have settled.
    """
    workloads = {
        "a100-opt-13b": (Lengths(250, 1.0), Lengths(200, 1.0), (0.25, 1.0), (0.1, 0.03)),
        "h200-llama-3.1-8b": (Lengths(4000, 0.5), Lengths(200, 1.0), (0.5, 2.0), (0.05, 0.008)),
    }
    table = Table("", "TTFT ms", "TPOT ms", "pools / colocated", "pools", "colocated")
    rows: list[dict[str, object]] = []
    for profile, (prompt, output, ttfts, tpots) in workloads.items():
        drawn = list(generate(rate=1, count=requests, prompt=prompt, output=output))
        planner = Planner(drawn, PUBLISHED[profile], gpus)
        for slo in (Slo(ttft, tpot) for ttft in ttfts for tpot in tpots):
            pools, colocated = planner.best_pools(slo), planner.best_colocated(slo)
            ratio = pools.goodput / colocated.goodput if colocated.goodput else None
            texts = [f"{one.placement}: {one.goodput:.2f}/s" for one in (pools, colocated)]
            shown = f"{ratio:.2f}" if ratio is not None else "only pools"
            table.add_row(profile, f"{slo.ttft * 1e3:g}", f"{slo.tpot * 1e3:g}", shown, *texts)
            slos = {"profile": profile, "ttft": slo.ttft, "tpot": slo.tpot, "workers": gpus}
            rows.append({**slos, "ratio": ratio, "pools": texts[0], "colocated": texts[1]})
    Console(width=160).print(table)
    record(RESULTS, "crossover", rows)


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
    """Requests within the SLO: of each static ratio, without prompts on decode and with all that it
    has room for, and of the autopilot begun at each ratio without them.
    """
    slo, worker = Slo(slo_ttft / 1e3, slo_tpot / 1e3), WorkerProfile.load(profile)
    workload = read_trace(trace, requests)
    longest = prompt_lengths(workload)[-1]
    pools = [Placement(prefill=p, decode=gpus - p) for p in range(1, gpus)]
    table = Table("requests/s", "", *(f"{p.prefill}P{p.decode}D" for p in pools))
    rows: list[dict[str, object]] = []

    def piloted(placement: Placement, at: float) -> tuple[float, int]:
        route = ElasticRoute(placement, worker, Limits(slo), predictor(worker, placement, slo))
        arrivals = at_rate(workload, at)
        outcome = simulate(arrivals, placement, worker, route=lambda *_: route, elastic=True)
        return outcome.attainment(slo), len(route.decisions)

    def static(placement: Placement, at: float) -> float:
        return simulate(at_rate(workload, at), placement, worker).attainment(slo)

    for at in rate:
        own = [one.with_pools(one.prefill, one.decode, longest) for one in pools]
        shares = {
            "static": [static(placement, at) for placement in pools],
            "static, prompts on decode": [static(placement, at) for placement in own],
        }
        found = [piloted(placement, at) for placement in pools]
        for name, of_ratio in shares.items():
            table.add_row(f"{at:g}", name, *(f"{share:.2%}" for share in of_ratio))
        table.add_row("", "autopilot", *(f"{share:.2%} ({num} changes)" for share, num in found))
        rows.append({"rate": at, **shares, "autopilot": found})
    Console(width=140).print(table)
    record(RESULTS, f"autopilot_{trace.stem}", {"requests": len(workload), "rates": rows})


def _all_pools(gpus: int, workload: list[Request]) -> list[Placement]:
    return [
        Placement(
            prefill=prefill,
            decode=gpus - prefill,
            max_num_batched_tokens=budget,
            local_prefill_tokens=local,
        )
        for prefill in range(1, gpus)
        for budget in BUDGETS
        for local in prompt_lengths(workload)
    ]


def _fixed(prompt: int, output: int, count: int) -> list[Request]:
    drawn = generate(rate=1, count=count, prompt=Lengths(prompt), output=Lengths(output))
    return list(drawn)


def _distserve_fit(path: Path) -> WorkerProfile:
    """OPT-13B on one A100, from a file of DistServe's simulator; its times are in milliseconds."""
    fits = json.loads(path.read_text())["facebook/opt-13b"]["1"]
    prefill, decode = ([ms / 1e3 for ms in fits[name]] for name in ("prefill", "decoding_smallbs"))
    latency = LinearLatency(
        prefill=PrefillFit(fixed=prefill[0], per_token=prefill[1], per_square=prefill[2]),
        decode=DecodeFit(fixed=decode[0], per_context=decode[1], per_row=decode[2]),
    )
    return PUBLISHED["a100-opt-13b"].model_copy(update={"latency": latency})


if __name__ == "__main__":
    app()
