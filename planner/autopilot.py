"""When to change the pools of a running system: decisions alone, made from what was observed.

Two loops share one question, ``which pools would have served these requests best``, answered by
simulation, so that queues and percentiles count:

    forecast  every minute, over the busiest part of the window, with some slack: moves to the best
              pools, and sets the range of ratios that the fast loop must stay in
    misses    every quarter of a minute, over the last one, only while deadlines are being missed:
              one worker at a time

Roles come first, since a role changes in seconds. Where no ratio keeps the SLO, decode may compute
prompts of its own up to a length, which takes no time to change. Workers are added or removed only
when neither would do, or when fewer would. Nothing here reads a clock or does I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from planner.autopilot_terms import Decision, Limits, Observation, Pools, Predict, State
from planner.observed import Row, outcome_of, requests_of
from planner.outcome import Slo
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.simulator import simulate
from planner.workload import Request, at_rate, prompt_lengths, rate_of
from protocol.errors import ConfigError

MOST = 600  # requests of one simulation
NEAR = 3  # workers that a forecast moves between the pools at most
CALM = 10  # cool-downs before a change may be taken back
CLOSE = 0.8  # share of the SLO's attainment below which nothing comes near it


def predictor(profile: WorkerProfile, limits: Placement, slo: Slo) -> Predict:
    """Predictions by simulation; the pools of ``limits`` are replaced."""

    def predict(requests: Sequence[Request], pools: Pools) -> float:
        local = pools.local_prefill_tokens or 0
        placement = limits.with_pools(pools.prefill, pools.decode, local)
        return simulate(requests, placement, profile).attainment(slo)

    return predict


def decide(
    seen: Observation, state: State, now: float, limits: Limits, predict: Predict
) -> tuple[State, Decision | None]:
    """What to change now, if anything, and the state after it. Never empties a pool."""
    cooling = state.changed is not None and now < state.changed + limits.cool_down
    one_pool = min(seen.pools.prefill, seen.pools.decode) == 0  # colocated, or not yet there
    if seen.changing or cooling or one_pool:
        return state, None
    decision = None
    if not seen.num_open and not _since(seen.rows, limits, limits.cool_down):
        decision = _idle(seen, now, limits)
    elif not _requests(_came(seen)):
        return state, None  # too little to go by: look again soon
    elif now >= state.forecast_due:
        state = replace(state, forecast_due=now + limits.forecast_every)
        state, decision = _forecast(seen, state, now, limits, predict)
    elif now >= state.react_due and _misses(seen, limits):
        state = replace(state, react_due=now + limits.react_every)
        decision = _react(seen, state, now, limits, predict)
    if decision is None:
        return state, None
    turned = _direction(decision)
    direction = turned[0] or state.direction[0], turned[1] or state.direction[1]
    unjudged = (*state.unjudged, decision)
    return replace(state, changed=now, direction=direction, unjudged=unjudged), decision


def judge(
    seen: Observation, state: State, now: float, limits: Limits
) -> tuple[State, list[Decision]]:
    """The decisions whose cool-down is over, each with what came of it."""
    judged, waiting = [], []
    for one in state.unjudged:
        end = one.at + limits.cool_down
        if now < end:
            waiting.append(one)
            continue
        begin = now - limits.window
        rows = [row for row in _known(seen, limits) if one.at <= begin + row.arrival < end]
        share = outcome_of(rows).attainment(limits.slo) if rows else None
        judged.append(replace(one, outcome=share))
    return replace(state, unjudged=tuple(waiting)), judged


def _idle(seen: Observation, now: float, limits: Limits) -> Decision | None:
    if limits.workers is None or seen.pools.num_workers <= limits.workers[0]:
        return None
    prefill = max(1, limits.workers[0] // 2)
    wanted = replace(seen.pools, prefill=prefill, decode=limits.workers[0] - prefill)
    reason = f"no request in {limits.cool_down:g} s: the fewest workers will do"
    return Decision(now, "idle", seen.pools, wanted, reason, None)


def _forecast(
    seen: Observation, state: State, now: float, limits: Limits, predict: Predict
) -> tuple[State, Decision | None]:
    """The best pools for the window's busiest part, coming faster by the slack."""
    requests = _requests(_came(seen))
    present, faster = seen.pools, _faster(requests, limits.slack)
    shares = _shares(faster, _ratios(present, NEAR), present, limits, predict)
    good = [pools.prefill for pools, share in shares.items() if share >= limits.slo.attainment]
    state = replace(state, allowed=range(min(good), max(good) + 1) if good else None)
    best = _best(shares, present)
    if shares[best] - shares[present] >= _margin(shares[best], limits):
        reason = f"at {1 / limits.slack:.2f} times the rate of the last {limits.window:g} s, "
        reason += f"{shares[present]:.1%} within the SLO at {present}, {shares[best]:.1%} at {best}"
        change = Decision(now, "forecast", present, best, reason, shares[best])
        if not _takes_back(change, state, limits):
            return state, change
    if limits.workers is None:
        return state, None
    return state, _other_number(requests, present, limits.workers, now, limits, predict)


def _other_number(
    requests: Sequence[Request],
    present: Pools,
    workers: tuple[int, int],
    now: float,
    limits: Limits,
    predict: Predict,
) -> Decision | None:
    """One worker more when the present ones do not keep the SLO, one fewer when that does too.

    Fewer workers must keep the SLO at a higher rate, so that they are not added again at once.
    """
    (fewest, most), number, target = workers, present.num_workers, limits.slo.attainment
    if predict(requests, present) < target:
        if number >= most:
            return None
        step, reason = 1, f"{number} workers do not keep the SLO, in whichever roles"
    elif number > fewest:
        step, reason = -1, f"fewer keep the SLO at {1 / limits.slack:.2f} times the rate"
        requests = _faster(requests, limits.slack)
    else:
        return None
    other = (
        replace(present, prefill=present.prefill + step),
        replace(present, decode=present.decode + step),
    )
    shares = {pools: predict(requests, pools) for pools in other if pools.prefill and pools.decode}
    wanted = max(shares, key=lambda pools: shares[pools])
    if step < 0 and shares[wanted] < target:
        return None
    return Decision(now, "workers", present, wanted, reason, shares[wanted])


def _misses(seen: Observation, limits: Limits) -> bool:
    rows = _since(_known(seen, limits), limits, limits.recent)
    late = bool(rows) and outcome_of(rows).attainment(limits.slo) < limits.slo.attainment
    return late or seen.wait > limits.slo.ttft


def _react(
    seen: Observation, state: State, now: float, limits: Limits, predict: Predict
) -> Decision | None:
    """One worker to the other pool, within what the forecast allows, or other prompts on decode."""
    requests = _requests(_since(_came(seen), limits, limits.recent))
    if not requests:
        return None
    present, allowed = seen.pools, state.allowed
    near = [
        pools
        for pools in _ratios(present, 1)
        if pools == present or allowed is None or pools.prefill in allowed
    ]
    shares = _shares(requests, near, present, limits, predict)
    best = _best(shares, present)
    if shares[best] - shares[present] < _margin(shares[best], limits):
        return None
    reason = f"deadlines are being missed: for the last {limits.recent:g} s {shares[present]:.1%}"
    reason += f" within the SLO at {present}, {shares[best]:.1%} at {best}, simulated"
    change = Decision(now, "misses", present, best, reason, shares[best])
    return None if _takes_back(change, state, limits) else change


def _ratios(present: Pools, near: int) -> list[Pools]:
    """Ratios of as many workers, at most ``near`` moved, no pool empty."""
    number = present.num_workers
    first, last = max(1, present.prefill - near), min(number - 1, present.prefill + near)
    return [
        replace(present, prefill=prefill, decode=number - prefill)
        for prefill in range(first, last + 1)
    ]


def _shares(
    requests: Sequence[Request],
    ratios: Sequence[Pools],
    present: Pools,
    limits: Limits,
    predict: Predict,
) -> dict[Pools, float]:
    """Of each ratio; where none keeps the SLO, also of the best with other prompts on decode."""
    shares = {pools: predict(requests, pools) for pools in ratios}
    best = _best(shares, present)
    if shares[best] < limits.slo.attainment and present.local_prefill_tokens is not None:
        for tokens in prompt_lengths(requests):
            pools = replace(best, local_prefill_tokens=tokens)
            shares[pools] = predict(requests, pools)
    return shares


def _best(shares: dict[Pools, float], present: Pools) -> Pools:
    """The highest share; of equal ones the least change."""
    return max(
        shares,
        key=lambda pools: (
            shares[pools],
            -abs(pools.prefill - present.prefill),
            pools.local_prefill_tokens == present.local_prefill_tokens,
        ),
    )


def _margin(best: float, limits: Limits) -> float:
    """What a change must gain. Where nothing helps much, shares vary more than pools differ."""
    return limits.margin if best >= CLOSE * limits.slo.attainment else limits.far_margin


def _came(seen: Observation) -> list[Row]:
    """What came, by arrival, whether it has ended or waits."""
    return sorted((*seen.rows, *seen.queued), key=attrgetter("arrival"))


def _known(seen: Observation, limits: Limits) -> list[Row]:
    """What kept or missed its deadlines: what ended, and what waits past its first deadline."""
    last = limits.window - limits.slo.ttft
    return [*seen.rows, *(row for row in seen.queued if row.arrival < last)]


def _since(rows: Sequence[Row], limits: Limits, seconds: float) -> list[Row]:
    return [row for row in rows if row.arrival >= limits.window - seconds]


def _requests(rows: Sequence[Row]) -> list[Request]:
    """The busiest part, no longer than a simulation takes; nothing while there is too little."""
    try:
        requests = requests_of(rows)
    except ConfigError:
        return []
    last = MOST - 1
    starts = range(max(1, len(requests) - last))
    begin = min(
        starts,
        key=lambda i: requests[min(i + last, len(requests) - 1)].arrival - requests[i].arrival,
    )
    return requests[begin : begin + MOST]


def _faster(requests: Sequence[Request], slack: float) -> list[Request]:
    return list(at_rate(requests, rate_of(requests) / slack))


def _takes_back(decision: Decision, state: State, limits: Limits) -> bool:
    """Whether it undoes the last change of roles too soon after it."""
    if state.changed is None:
        return False
    soon = decision.at < state.changed + CALM * limits.cool_down
    turned = zip(_direction(decision), state.direction, strict=True)
    return soon and any(now * last < 0 for now, last in turned)


def _direction(decision: Decision) -> tuple[int, int]:
    """1 for more, -1 for fewer: prefill workers, tokens of decode's longest prompt."""
    wanted, present = decision.wanted, decision.present
    if wanted.num_workers != present.num_workers:
        return 0, 0
    tokens = wanted.local_prefill_tokens or 0, present.local_prefill_tokens or 0
    return _sign(wanted.prefill - present.prefill), _sign(tokens[0] - tokens[1])


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
