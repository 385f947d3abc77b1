"""Which simulated workers serve a request: the router's own policy, or the same rule at scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engine.block_pool import BlockPool
from planner.job import Job
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.workload import Request
from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import Register, Role, WorkerLoad
from router.capacity import LOOK_AHEAD, MIN_PROMPTS, Demand, uncached_tokens
from router.disaggregation import Disaggregation
from router.policy import Pair, PolicyName
from router.registry import Assignment, Registry

LONG_PROMPT = 2048  # tokens, over which a worker's prefill rate is taken

Workers = tuple[int | None, int]
"""A job's prefill and decode worker, by their index. Without the first, decode does both."""


class Route(Protocol):
    """Chooses workers and hears when they are done with a job."""

    def watch(
        self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool], waiting: Sequence[Job]
    ) -> None:
        """The workers' block pools, and the jobs that have no workers yet; before the first job."""

    def choose(self, job: Job, now: float) -> Workers | None:
        """The job's workers; None when it must wait in the router, for another's end."""

    def prefilled(self, job: Job) -> None:
        """The job has its first token."""

    def ended(self, job: Job) -> None:
        """Decode is done with the job."""


class RouterPolicy:
    """``router.disaggregation`` and a policy of ``router.policy`` over a registry.

    One router gives all the work and hears of each end at once, so its own count is never behind
    and load reports would add nothing. It hears of stored and evicted blocks at once, too.
    """

    def __init__(
        self, placement: Placement, profile: WorkerProfile, policy: PolicyName = "prefix-aware"
    ) -> None:
        local = placement.local_prefill_tokens
        self._disaggregation = Disaggregation("auto" if local else "always", local or None, policy)
        self._block_size = placement.block_size
        self._registry = Registry(timeout=1.0)
        self._pairs: dict[int, Pair] = {}
        pools: tuple[tuple[Role, int], ...]
        pools = ("prefill", placement.prefill), ("decode", placement.decode)
        for role, count in pools:
            for index in range(count):
                info = _registration(role, index, placement, profile)
                self._registry.register(info.worker_id.encode(), info, now=0.0)

    def watch(
        self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool], waiting: Sequence[Job]
    ) -> None:
        """See ``Route``. What waits plays no part."""
        for pool, worker in zip([*prefill, *decode], self._registry.all(), strict=True):
            pool.listeners.append(_Findable(worker.cached.keys))

    def choose(self, job: Job, now: float) -> Workers | None:
        """See ``Route``."""
        prompt = job.request.prompt_tokens
        num_blocks = (prompt - 1) // self._block_size
        keys = list(map(hash, job.sequence.block_hashes[:num_blocks]))
        demand = Demand(prompt, job.request.num_tokens, lambda _: keys)
        pair = self._disaggregation.choose(self._registry, demand)
        if pair is None:
            return None
        self._pairs[job.number] = pair
        computes = pair.prefill or pair.decode
        for worker in pair.workers:
            to_compute = uncached_tokens(worker, demand) if worker is computes else 0
            assignment = Assignment(
                prompt,
                demand.expected_tokens,
                begun=False,
                prompt_tokens=to_compute,
                prefix=keys if worker is computes else (),
            )
            self._registry.give(worker, str(job.number), assignment)
        return pair.prefill.info.epoch if pair.prefill else None, pair.decode.info.epoch

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        pair, name = self._pairs[job.number], str(job.number)
        if pair.prefill is None:
            pair.decode.goes_on(name, job.request.prompt_tokens)
        else:
            pair.prefill.end(name)
        (pair.prefill or pair.decode).told_cache()

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        self._pairs.pop(job.number).decode.end(str(job.number))


class _Findable:
    """A pool's listener: simulated blocks have names of any length, so their keys are whole."""

    def __init__(self, keys: set[int]) -> None:
        self._keys = keys

    def stored(self, block_hash: bytes, _: int) -> None:
        self._keys.add(hash(block_hash))

    def evicted(self, block_hash: bytes) -> None:
        self._keys.discard(hash(block_hash))


class Places:
    """What decode workers hold or were promised, for their whole lengths.

    Which of them have a place is ``router.capacity.takes_sequence``'s rule.
    """

    def __init__(self, num_workers: int, placement: Placement, profile: WorkerProfile) -> None:
        self.held = [0] * num_workers  # sequences
        self._blocks = [0] * num_workers
        self._max_num_seqs = placement.max_num_seqs
        self._block_size = placement.block_size
        self._num_blocks = profile.kv_tokens // placement.block_size

    def has(self, index: int, request: Request) -> bool:
        """Whether a worker has a slot and KV for another request. Alone there each one fits."""
        held, blocks = self.held[index], self._blocks[index] + self._needed(request)
        return held == 0 or (held < self._max_num_seqs and blocks <= self._num_blocks)

    def take(self, index: int, request: Request) -> None:
        """The request is given to a worker."""
        self.held[index] += 1
        self._blocks[index] += self._needed(request)

    def leave(self, index: int, request: Request) -> None:
        """The worker is done with it."""
        self.held[index] -= 1
        self._blocks[index] -= self._needed(request)

    def _needed(self, request: Request) -> int:
        return -(-request.num_tokens // self._block_size)


class Prompts:
    """What workers have yet to compute. Which of them take another prompt is
    ``router.capacity.takes_prompt``'s rule, without caches.
    """

    def __init__(self, num_workers: int, profile: WorkerProfile) -> None:
        self.tokens = [0] * num_workers
        self.num = [0] * num_workers
        self._ahead = LOOK_AHEAD * prefill_rate(profile)

    def taken(self, index: int) -> bool:
        """Whether a worker takes another one."""
        return self.num[index] < MIN_PROMPTS or self.tokens[index] < self._ahead

    def add(self, index: int, tokens: int) -> None:
        """A prompt is given to a worker."""
        self.num[index] += 1
        self.tokens[index] += tokens

    def end(self, index: int, tokens: int) -> None:
        """It is computed."""
        self.num[index] -= 1
        self.tokens[index] -= tokens


class LeastLoaded:
    """The same rules in linear time: fewest prompt tokens queued, fewest sequences held.

    Colocated workers compare by both, in that order.
    """

    def __init__(self, placement: Placement, profile: WorkerProfile) -> None:
        self._placement = placement
        num_decode = placement.decode or placement.colocated
        self.prompts = Prompts(placement.prefill, profile)
        self._own = Prompts(num_decode, profile)  # that decode computes
        self._places = Places(num_decode, placement, profile)
        self._workers: dict[int, Workers] = {}

    def watch(
        self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool], waiting: Sequence[Job]
    ) -> None:
        """See ``Route``. Neither caches nor what waits play a part."""

    def choose(self, job: Job, now: float) -> Workers | None:
        """See ``Route``."""
        chosen = self._colocated(job) if self._placement.colocated else self._pair(job)
        if chosen is not None:
            self._workers[job.number] = chosen
            self._places.take(chosen[1], job.request)
            prompts, index = self._queue(job)
            prompts.add(index, job.request.prompt_tokens)
        return chosen

    def prefill_for(self, job: Job) -> int | None:
        """The prefill worker of a pool; None where none takes another prompt."""
        return _least(self.prompts.tokens, self.prompts.taken)

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        prompts, index = self._queue(job)
        prompts.end(index, job.request.prompt_tokens)

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        _, decode = self._workers.pop(job.number)
        self._places.leave(decode, job.request)

    def _colocated(self, job: Job) -> Workers | None:
        loads = list(zip(self._own.tokens, self._places.held, strict=True))
        worker = _least(
            loads, lambda index: self._own.taken(index) and self._places.has(index, job.request)
        )
        return None if worker is None else (None, worker)

    def _pair(self, job: Job) -> Workers | None:
        held = self._places.held
        decode = _least(held, lambda index: self._places.has(index, job.request))
        if decode is None:
            return None
        if is_short(job.request, self._placement, held[decode], self._own.tokens[decode]):
            return None, decode
        prefill = self.prefill_for(job)
        return None if prefill is None else (prefill, decode)

    def _queue(self, job: Job) -> tuple[Prompts, int]:
        """Where the job's prompt is, or is to be, computed."""
        prefill, decode = self._workers[job.number]
        return (self._own, decode) if prefill is None else (self.prompts, prefill)


def _least(loads: Sequence[Any], free: Callable[[int], bool]) -> int | None:
    """The worker of the smallest load; only if that one is not free, the least loaded that is."""
    best: int = loads.index(min(loads))
    if free(best):
        return best
    return min(filter(free, range(len(loads))), key=loads.__getitem__, default=None)


def prefill_rate(profile: WorkerProfile) -> float:
    """Prompt tokens a second."""
    return LONG_PROMPT / profile.latency.step_seconds(LONG_PROMPT, LONG_PROMPT**2, 0, 0)


def is_short(request: Request, placement: Placement, held: int, own_tokens: int) -> bool:
    """Whether a decode worker computes the prompt itself: ``router.disaggregation``'s rule.

    It holds ``held`` sequences and has ``own_tokens`` of other prompts to compute.
    """
    spare = own_tokens == 0 and 2 * held < placement.max_num_seqs
    uncached = request.prompt_tokens - request.cached_tokens
    return spare and uncached <= placement.local_prefill_tokens


def _registration(role: Role, index: int, placement: Placement, profile: WorkerProfile) -> Register:
    size = placement.block_size
    blocks = profile.kv_tokens // size
    geometry = KVGeometry(
        num_kv_heads=1, num_layers=1, block_size=size, head_dim=1, dtype="float32"
    )
    load = WorkerLoad(
        free_blocks=blocks,
        total_blocks=blocks,
        max_num_seqs=placement.max_num_seqs,
        prefill_tokens_per_second=prefill_rate(profile),
    )
    return Register(
        worker_id=f"{role}-{index}",
        epoch=index,
        session=0,
        role=role,
        model=profile.name,
        fingerprint=Fingerprint(weights_digest="", rope="", geometry=geometry),
        vocab_size=1,
        max_model_len=profile.kv_tokens,
        pid=0,
        host="",
        control="",
        data=b"",
        transport="",
        metrics="",
        load=load,
    )
