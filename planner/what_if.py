"""An operator's question: what would these workers give as other pools, at another rate?

Answered within about a second, so that a slider can be turned: ``NUM_REQUESTS`` requests, those
that came last or all of them again and again, are simulated for the percentiles, and for each
point of the curve over the rate as many as the time allows. The present pools at the present rate
are predicted as well, beside what was measured: that tells how far the model may be trusted.

Beyond its capacity a placement's queue grows without end, and what a simulation finds there depends
on when it stops. So nothing is simulated there: in the long run no request keeps its TTFT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from planner.observed import Row, outcome_of, placement_of, repeated, requests_of
from planner.outcome import Outcome, Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import simulate
from planner.workload import Request, at_rate, rate_of

NUM_REQUESTS = 500  # of a simulation for percentiles
CURVE_REQUESTS = range(200, NUM_REQUESTS)  # of each point of the curve
CURVE_POINTS = 8
BEYOND = 1.25  # the curve's last rate, over what the pools could carry at most
CONFIDENCE = 1.96  # standard errors of 95 %
FIT = 1.5  # factor by which a prediction may be off and still guide


@dataclass(frozen=True, slots=True)
class View:
    """How requests fare in the long run. Times in seconds by percentile; None: there is none.

    ``beyond_capacity``: TTFT grows without end, and no request keeps it.
    """

    beyond_capacity: bool
    ttft: dict[str, float | None]
    tpot: dict[str, float | None]
    attainment: float  # share within both deadlines
    goodput: float  # requests a second within both


@dataclass(frozen=True, slots=True)
class Point:
    """Goodput at a rate, of the present pools and of those asked about. Requests a second.

    0 beyond their capacity.
    """

    rate: float
    present: float
    asked: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Rates in requests a second. ``margin`` is attainment's own, at 95 %, by chance alone."""

    rate: float  # asked about
    measured_rate: float
    num_observed: int
    num_simulated: int
    margin: float
    present_pools: tuple[int, int]  # prefill and decode workers
    capacity: float  # of the pools asked about: beyond it their queue grows without end
    measured: View
    present: View  # predicted for the present pools at the measured rate
    fits: bool  # those two agree
    asked: View
    curve: list[Point]


def answer(
    rows: Sequence[Row],
    workers: Sequence[dict[str, object]],
    profile: WorkerProfile,
    *,
    pools: tuple[int, int],
    rate_factor: float,
    slo: Slo,
    seconds: float,
    local_prefill_tokens: int = 0,
) -> Answer:
    """Predict ``pools`` (prefill workers, decode workers; no prefill: colocated).

    The rate is the measured one times ``rate_factor``. Decode computes prompts of up to
    ``local_prefill_tokens`` itself, in the present pools and in those asked about. Takes about
    ``seconds``. Raises ConfigError when too little was observed.
    """
    deadline = time.perf_counter() + seconds
    requests = requests_of(rows)
    usual = mean(request.prompt_tokens for request in requests)
    placement = placement_of(workers, usual, local_prefill_tokens)
    present = _Pools(requests, placement, profile, slo)
    asked = _Pools(requests, placement.with_pools(*pools), profile, slo)
    measured_rate = rate_of(requests)
    rate = measured_rate * rate_factor
    begun = time.perf_counter()
    after = asked.outcome(min(rate, asked.capacity), NUM_REQUESTS)
    before = present.outcome(min(measured_rate, present.capacity), NUM_REQUESTS)
    each = (time.perf_counter() - begun) / (2 * NUM_REQUESTS)
    fitting = int((deadline - time.perf_counter()) / each / (2 * CURVE_POINTS))
    num = min(max(fitting, CURVE_REQUESTS.start), CURVE_REQUESTS.stop)
    end = BEYOND * max(rate, present.capacity, asked.capacity)
    curve = []
    for at in (end * step / CURVE_POINTS for step in range(1, CURVE_POINTS + 1)):
        good = asked.goodput(at, num)
        now = good if asked.placement == placement else present.goodput(at, num)
        curve.append(Point(at, now, good))
    return Answer(
        rate=rate,
        measured_rate=measured_rate,
        num_observed=len(rows),
        num_simulated=NUM_REQUESTS,
        margin=_margin(after.attainment(slo)) if rate <= asked.capacity else 0.0,
        present_pools=(placement.prefill, placement.decode or placement.colocated),
        capacity=asked.capacity,
        measured=_view(outcome_of(rows), measured_rate, slo, beyond_capacity=False),
        present=present.view(before, measured_rate),
        fits=fits(outcome_of(rows), before),
        asked=asked.view(after, rate),
        curve=curve,
    )


class _Pools:
    """One placement under one workload, at any rate."""

    def __init__(
        self, requests: Sequence[Request], placement: Placement, profile: WorkerProfile, slo: Slo
    ) -> None:
        self.placement = placement
        self.capacity = capacity(requests, placement, profile)
        self._requests = requests
        self._profile = profile
        self._slo = slo

    def outcome(self, rate: float, num: int) -> Outcome:
        """Of ``num`` requests."""
        requests = at_rate(repeated(self._requests, num), rate)
        return simulate(requests, self.placement, self._profile)

    def goodput(self, rate: float, num: int) -> float:
        """Requests a second within both deadlines."""
        if rate > self.capacity:
            return 0.0
        return rate * self.outcome(rate, num).attainment(self._slo)

    def view(self, outcome: Outcome, rate: float) -> View:
        """How the requests of a run fared at ``rate``, or at capacity if that is less."""
        return _view(outcome, rate, self._slo, beyond_capacity=rate > self.capacity)


def capacity(requests: Sequence[Request], placement: Placement, profile: WorkerProfile) -> float:
    """Requests a second that a placement can compute, all steps full.

    A colocated worker's steps carry chunks and rows, and read the weights once for both. A row of
    a decode step is of a request with the chance of its share of all rows, so long ones weigh more.
    """
    seconds = profile.latency.step_seconds
    output, to_prefill = 0.0, 0.0  # means of a request
    held, context = 0.0, 0.0  # tokens of a row: reserved for its request, and read
    for request in requests:
        length, cached = request.prompt_tokens, request.cached_tokens
        tokens, squares = max(1, length - cached), length**2 - cached**2
        together = max(1, placement.max_num_batched_tokens // tokens)
        rows = request.output_tokens / len(requests)
        output += rows
        held += rows * (length + request.output_tokens)
        context += rows * (length + request.output_tokens / 2)
        step = seconds(together * tokens, together * squares, 0, 0)
        to_prefill += step / together / len(requests)
    batch = max(1, min(placement.max_num_seqs, int(profile.kv_tokens * output / held)))
    context *= batch / output
    step = seconds(0, 0, batch, context)
    to_decode = output * step / batch
    if placement.colocated:
        rows = output * (seconds(0, 0, 2 * batch, 2 * context) - step) / batch
        return placement.colocated / max(to_decode, to_prefill + rows)
    return min(placement.prefill / to_prefill, placement.decode / to_decode)


def fits(measured: Outcome, predicted: Outcome) -> bool:
    """Whether medians and 90th percentiles agree within a factor of ``FIT``."""
    one, other = measured.figures(), predicted.figures()
    names = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
    return all(one[name] <= FIT * other[name] and other[name] <= FIT * one[name] for name in names)


def _margin(attainment: float) -> float:
    """Half of attainment's 95 % interval, by chance alone (Agresti and Coull, 1998)."""
    num = NUM_REQUESTS + 4
    share = (attainment * NUM_REQUESTS + 2) / num
    return CONFIDENCE * math.sqrt(share * (1 - share) / num)


def _view(outcome: Outcome, rate: float, slo: Slo, *, beyond_capacity: bool) -> View:
    attainment = 0.0 if beyond_capacity else outcome.attainment(slo)
    figures = {
        name: None if math.isnan(value) else value for name, value in outcome.figures().items()
    }
    if beyond_capacity:
        figures |= dict.fromkeys(("ttft_p50", "ttft_p90", "ttft_p99"))

    def percentiles(name: str) -> dict[str, float | None]:
        return {f"p{percent}": figures[f"{name}_p{percent}"] for percent in (50, 90, 99)}

    ttft, tpot = percentiles("ttft"), percentiles("tpot")
    return View(beyond_capacity, ttft, tpot, attainment, rate * attainment)
