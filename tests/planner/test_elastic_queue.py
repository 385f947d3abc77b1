"""What waits in the simulated router: the autopilot over simulated workers is shown it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

import pytest

from planner import elastic
from planner.autopilot_terms import Decision, Limits, Observation, Pools, State
from planner.elastic import LOOK_EVERY, ElasticRoute
from planner.job import Job, new_job
from planner.observed import Row
from planner.outcome import Slo
from planner.placement import Placement
from planner.simulator import simulate
from planner.workload import Request
from tests.planner.profiles import profile

LIMITS = Limits(Slo(ttft=0.5, tpot=0.1))
WORKER = profile(per_token=1e-3)  # 1000 prompt tokens a second
LONG = 8000  # tokens of a prompt: eight seconds


def predict(requests: Sequence[Request], pools: Pools) -> float:
    """Any ratio will do, but where there are long prompts: the more prefill workers the better."""
    return pools.prefill / 4 if any(r.prompt_tokens == LONG for r in requests) else 1.0


class Waiting:
    """A route, and what it has not placed. ``seen`` is what the autopilot was shown."""

    def __init__(self) -> None:
        placement = Placement(prefill=2, decode=2)
        self.route = ElasticRoute(placement, WORKER, LIMITS, predict)
        self.seen: list[Observation] = []
        self._block_size = placement.block_size
        self._jobs: deque[Job] = deque()
        self._numbers = count()
        self.route.watch([], [], self._jobs)

    def decide(self, seen: Observation, state: State, *_: object) -> tuple[State, Decision | None]:
        """In the autopilot's place."""
        self.seen.append(seen)
        return state, None

    def arrive(self, at: float, prompt_tokens: int) -> Job:
        job = new_job(next(self._numbers), Request(at, prompt_tokens, 10), self._block_size)
        self._jobs.append(job)
        self.place(at)
        return job

    def place(self, now: float) -> None:
        """As the simulator does: in order, until one must wait."""
        while self._jobs and self.route.choose(self._jobs[0], now) is not None:
            self._jobs.popleft()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    made = Waiting()
    monkeypatch.setattr(elastic, "decide", made.decide)
    return made


def test_each_request_that_no_worker_has_is_shown_by_its_arrival_in_the_window(
    waiting: Waiting,
) -> None:
    for _ in range(4):  # two for each prefill worker
        waiting.arrive(0.0, 5000)
    for at, prompt_tokens in ((50.0, 100), (150.0, 200), (690.0, 300)):
        waiting.arrive(at, prompt_tokens)
    waiting.place(700.0)
    seen = waiting.seen[-1]
    assert seen.queued == [
        Row(50.0, 200, 0, 0, None, None),  # the window began at 100
        Row(590.0, 300, 0, 0, None, None),
    ]
    assert seen.num_open == 7


def test_the_wait_is_what_is_ahead_at_prefill_and_in_the_router_or_what_the_first_has_waited(
    waiting: Waiting,
) -> None:
    first, *_ = [waiting.arrive(0.0, prompt_tokens) for prompt_tokens in (2000, 1000, 2000, 1000)]
    waiting.arrive(LOOK_EVERY, 600)
    assert waiting.seen[-1].wait == pytest.approx((6000 + 600) / (2 * 1000))
    waiting.route.prefilled(first)
    waiting.place(2 * LOOK_EVERY)
    assert waiting.seen[-1].wait == LOOK_EVERY > (4000 + 600) / (2 * 1000)
    waiting.arrive(3 * LOOK_EVERY, 400)
    assert waiting.seen[-1].wait == pytest.approx((4000 + 600 + 400) / (2 * 1000))


def test_a_burst_changes_the_pools_while_nearly_all_of_it_waits() -> None:
    calm = [Request(float(second), 100, 10) for second in range(70)]
    burst = [Request(70.0, LONG, 10)] * 20
    placement = Placement(prefill=1, decode=3)
    route = ElasticRoute(placement, WORKER, LIMITS, predict)
    simulate([*calm, *burst], placement, WORKER, route=lambda *_: route, elastic=True)
    first = route.decisions[0]
    assert (first.kind, first.wanted.prefill) == ("misses", 2)
    assert first.at < 80, "no more than one of the burst has ended"
