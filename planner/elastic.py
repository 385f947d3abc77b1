"""The autopilot over simulated workers: a route that also changes their roles.

A worker that is to change takes nothing new, ends what it has, and serves in its new role
``FLIP_SECONDS`` later, as the running system's does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from engine.block_pool import BlockPool
from planner.autopilot import decide, judge
from planner.autopilot_terms import Decision, Limits, Observation, Pools, Predict, State
from planner.job import Job
from planner.observed import Row
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.routing import Places, Prompts, Workers, is_short, prefill_rate
from protocol.messages import Role

LOOK_EVERY = 5.0  # seconds
FLIP_SECONDS = 2.0  # from the end of a worker's drain to its new role


class ElasticRoute:
    """The rules of ``planner.routing.LeastLoaded`` among the workers of the role.

    To be used with ``simulate(..., elastic=True)``. It looks at the pools when a request comes:
    ``decisions`` are those that it carried out, ``judged`` the same with what came of them.
    """

    def __init__(
        self, placement: Placement, profile: WorkerProfile, limits: Limits, predict: Predict
    ) -> None:
        roles: list[Role] = ["prefill"] * placement.prefill
        self._roles = [*roles, *(["decode"] * placement.decode)]
        self._placement = placement
        self._next: dict[int, Role] = {}  # workers that drain, and what they become
        self._ready = [0.0] * placement.num_workers
        self._prompts = Prompts(placement.num_workers, profile)  # in either role
        self._places = Places(placement.num_workers, placement, profile)  # that decode holds
        self._workers: dict[int, Workers] = {}
        self._waiting: Sequence[Job] = ()
        self._limits, self._predict = limits, predict
        self._rate = prefill_rate(profile)
        self._state = State.at_start(0.0, limits)
        self._look_due = 0.0
        self._ended: deque[Row] = deque()  # arrivals on the simulation's clock
        self.decisions: list[Decision] = []
        self.judged: list[Decision] = []

    def watch(
        self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool], waiting: Sequence[Job]
    ) -> None:
        """See ``Route``. Caches play no part."""
        self._waiting = waiting

    def choose(self, job: Job, now: float) -> Workers | None:
        """See ``Route``."""
        if now >= self._look_due:
            self._look_due = now + LOOK_EVERY
            self._look(now)
        held = self._places.held
        free = (i for i in self._serving("decode", now) if self._places.has(i, job.request))
        decode = min(free, key=held.__getitem__, default=None)
        if decode is None:
            return None
        prefill, tokens = None, self._prompts.tokens
        if not is_short(job.request, self._placement, held[decode], tokens[decode]):
            taken = filter(self._prompts.taken, self._serving("prefill", now))
            prefill = min(taken, key=tokens.__getitem__, default=None)
            if prefill is None:
                return None
        self._workers[job.number] = prefill, decode
        self._places.take(decode, job.request)
        self._prompts.add(decode if prefill is None else prefill, job.request.prompt_tokens)
        return prefill, decode

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        prefill, decode = self._workers[job.number]
        self._prompts.end(decode if prefill is None else prefill, job.request.prompt_tokens)
        if prefill is not None:
            self._drained(prefill, job.first_token)

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        decode = self._workers.pop(job.number)[1]
        self._places.leave(decode, job.request)
        self._drained(decode, job.last_token)
        request, others = job.request, job.request.output_tokens - 1
        tpot = (job.last_token - job.first_token) / others if others else None
        row = Row(
            request.arrival,
            request.prompt_tokens,
            request.output_tokens,
            job.sequence.num_cached,
            job.first_token - request.arrival,
            tpot,
        )
        self._ended.append(row)

    def _serving(self, role: Role, now: float) -> list[int]:
        return [
            index
            for index, its in enumerate(self._roles)
            if its == role and index not in self._next and self._ready[index] <= now
        ]

    def _look(self, now: float) -> None:
        begin = now - self._limits.window
        while self._ended and self._ended[0].arrival < begin:
            self._ended.popleft()
        rows = (row._replace(arrival=row.arrival - begin) for row in self._ended)
        seen = Observation(
            Pools(
                self._roles.count("prefill"),
                self._roles.count("decode"),
                self._placement.local_prefill_tokens,
            ),
            sorted((row for row in rows if row.arrival >= 0), key=lambda row: row.arrival),
            [
                Row(request.arrival - begin, request.prompt_tokens, 0, 0, None, None)
                for request in (job.request for job in self._waiting)
                if request.arrival >= begin
            ],
            self._wait(now),
            num_open=len(self._waiting) + len(self._workers),
            changing=bool(self._next) or max(self._ready) > now,
        )
        self._state, judged = judge(seen, self._state, now, self._limits)
        self.judged += judged
        self._state, decision = decide(seen, self._state, now, self._limits, self._predict)
        if decision is not None:
            self.decisions.append(decision)
            self._change(decision, now)

    def _wait(self, now: float) -> float:
        """As ``router.admission`` tells it: the forecast, or what the first has waited already."""
        prefill = self._serving("prefill", now)
        ahead = sum(self._prompts.tokens[index] for index in prefill)
        ahead += sum(job.request.prompt_tokens for job in self._waiting)
        first = min((job.request.arrival for job in self._waiting), default=now)
        return max(ahead / (len(prefill) * self._rate), now - first)

    def _change(self, decision: Decision, now: float) -> None:
        """The least loaded workers of the pool that shrinks change."""
        wanted = decision.wanted
        self._placement = self._placement.with_pools(
            wanted.prefill, wanted.decode, wanted.local_prefill_tokens
        )
        more = decision.wanted.prefill - decision.present.prefill
        source: Role = "decode" if more > 0 else "prefill"
        target: Role = "prefill" if more > 0 else "decode"
        leaving = sorted(self._serving(source, now), key=self._holds)[: abs(more)]
        for index in leaving:
            self._next[index] = target
            self._drained(index, now)

    def _holds(self, index: int) -> int:
        """Sequences of a worker, in either role."""
        return self._prompts.num[index] + self._places.held[index]

    def _drained(self, index: int, now: float) -> None:
        """Once a worker that is to change holds nothing, it changes."""
        if index in self._next and not self._holds(index):
            self._roles[index] = self._next.pop(index)
            self._ready[index] = now + FLIP_SECONDS
