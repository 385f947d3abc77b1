"""What a run's times mean: the figures that operators set SLOs on. Pure functions.

Formulas, for a request sent at time 0 whose n tokens arrive at t[0] <= ... <= t[n-1]:

    TTFT = t[0]      E2E = t[n-1]      TPOT = (t[n-1] - t[0]) / (n - 1)      ITL = t[i] - t[i-1]

as vLLM's and SGLang's benchmarks define them; ITL is of events, which carry a token or several.
Goodput counts requests within both deadlines a second (Zhong et al., DistServe, OSDI '24). TPOT
forgives a stall that a burst makes up for, so each token has a deadline too, TTFT + i * TPOT of
the SLO (after Agrawal et al., Etalon, 2024, without its reset after a miss).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.serving.record import ClientLoad, Result, Run
from planner.outcome import Slo

LATE = 0.01  # seconds: a client later than this in 1 % of cases distorts what it measures
FULL = 0.95  # of the output tokens asked for: an endpoint that stops early has less to do
FEW = 100  # requests; fewer have no 99th percentile to speak of
BUSY = 0.8  # of a core: a client above this has no room for bursts

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds; NaN when nothing was measured."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Measures:
    """One run's figures. Rates are a second, over the time from the first sending to the end."""

    duration: float
    requests: int
    completed: int
    errors: dict[str, int]  # by kind
    prompt_tokens: int  # of completed requests, as the next
    output_tokens: int
    expected_tokens: int  # of output, as asked for
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput: float
    attainment: float  # share of requests within both deadlines; failed ones are not
    deadline_attainment: float  # share of tokens on time; those that never came are not
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    lag: Distribution  # sent less scheduled


def measure(run: Run, slo: Slo) -> Measures:
    """All figures of a run with at least one request."""
    done = completed(run.results)
    first = min(result.sent for result in run.results)
    duration = max(result.ended for result in run.results) - first
    met = sum(meets(result, slo) for result in run.results)
    on_time = sum(tokens_on_time(result, slo) for result in run.results)
    due = sum(max(r.expected_tokens if r.error else 0, r.output_tokens) for r in run.results)
    prompts, outputs = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    return Measures(
        duration=duration,
        requests=len(run.results),
        completed=len(done),
        errors=dict(Counter(result.error for result in run.results if result.error)),
        prompt_tokens=prompts,
        output_tokens=outputs,
        expected_tokens=sum(r.expected_tokens for r in done),
        requests_per_s=len(done) / duration,
        prompt_tokens_per_s=prompts / duration,
        output_tokens_per_s=outputs / duration,
        goodput=met / duration,
        attainment=met / len(run.results),
        deadline_attainment=on_time / due,
        ttft=distribution(ttfts(done)),
        tpot=distribution(tpots(done)),
        itl=distribution(itls(done)),
        e2e=distribution(e2es(done)),
        lag=distribution(np.array([r.sent - r.scheduled for r in run.results])),
    )


def warnings(measures: Measures, load: ClientLoad) -> list[str]:
    """Reasons to distrust the figures, in words; the client's own slowness above all."""
    found = []
    if measures.lag.p99 > LATE:
        found.append(
            f"the client sent 1 % of requests more than {measures.lag.p99 * 1e3:.0f} ms late"
        )
    if load.stall_p99 > LATE:
        found.append(
            f"the client's event loop was more than {load.stall_p99 * 1e3:.0f} ms late 1 % of the"
            " time, and so may be the times of tokens"
        )
    if load.cpu > BUSY * load.wall:
        found.append(
            f"the client kept a core {load.cpu / load.wall:.0%} busy: it is the bottleneck"
        )
    if measures.output_tokens < FULL * measures.expected_tokens:
        share = measures.output_tokens / measures.expected_tokens
        found.append(f"outputs have {share:.0%} of the tokens asked for: the load was lighter")
    if measures.completed < FEW:
        found.append(f"only {measures.completed} requests: p99 is little more than the slowest one")
    return found


def completed(results: Iterable[Result]) -> list[Result]:
    """Those without an error."""
    return [result for result in results if result.error is None]


def ttfts(results: Sequence[Result]) -> Floats:
    """Seconds to the first token. Shape (requests,)."""
    return np.array([result.times[0] for result in results])


def tpots(results: Sequence[Result]) -> Floats:
    """Mean seconds between a request's tokens, of requests with two tokens or more."""
    return np.array([tpot(result) for result in results if result.output_tokens > 1])


def itls(results: Sequence[Result]) -> Floats:
    """Seconds between neighbouring events of all requests."""
    return np.concatenate([np.empty(0), *(np.diff(result.times) for result in results)])


def e2es(results: Sequence[Result]) -> Floats:
    """Seconds to the last token. Shape (requests,)."""
    return np.array([result.times[-1] for result in results])


def tpot(result: Result) -> float:
    """Mean seconds between tokens; 0 of a single one."""
    gaps = result.output_tokens - 1
    return (result.times[-1] - result.times[0]) / gaps if gaps > 0 else 0.0


def meets(result: Result, slo: Slo) -> bool:
    """Whether a request ended well and within both deadlines."""
    return result.error is None and result.times[0] <= slo.ttft and tpot(result) <= slo.tpot


def tokens_on_time(result: Result, slo: Slo) -> int:
    """Tokens that came by ``ttft + i * tpot``. Several in one event are spread evenly over all."""
    if not result.times:
        return 0
    tokens = np.arange(result.output_tokens)
    arrived = np.array(result.times)[tokens * len(result.times) // result.output_tokens]
    return int((arrived <= slo.ttft + tokens * slo.tpot).sum())


def distribution(values: Floats) -> Distribution:
    """Percentiles by linear interpolation (Hyndman and Fan's type 7, NumPy's default)."""
    if not len(values):
        return Distribution(*[math.nan] * 6)
    p50, p90, p95, p99 = map(float, np.percentile(values, (50, 90, 95, 99)))
    return Distribution(float(values.mean()), p50, p90, p95, p99, float(values.max()))
