"""Which simulated workers serve a request: the router's own policy, or the same rule at scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.block_pool import BlockPool
from planner.job import Job
from planner.placement import Placement
from planner.profile import WorkerProfile
from planner.workload import Request
from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import Register, Role, WorkerLoad
from router.capacity import Demand, uncached_tokens
from router.disaggregation import Disaggregation
from router.policy import Pair, PolicyName
from router.registry import Assignment, Registry

LONG_PROMPT = 2048  # tokens, over which a worker's prefill rate is taken

Workers = tuple[int | None, int]
"""A job's prefill and decode worker, by their index. Without the first, decode does both."""


class Route(Protocol):
    """Chooses workers and hears when they are done with a job."""

    def watch(self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool]) -> None:
        """The workers' block pools, before the first job."""

    def choose(self, job: Job) -> Workers | None:
        """The job's workers; None when it must wait for another's end."""

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

    def watch(self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool]) -> None:
        """See ``Route``."""
        for pool, worker in zip([*prefill, *decode], self._registry.all(), strict=True):
            pool.listeners.append(_Findable(worker.cached.keys))

    def choose(self, job: Job) -> Workers | None:
        """See ``Route``."""
        prompt = job.request.prompt_tokens
        num_blocks = (prompt - 1) // self._block_size
        keys = list(map(hash, job.sequence.block_hashes[:num_blocks]))
        demand = Demand(prompt, prompt + job.request.output_tokens, lambda _: keys)
        pair = self._disaggregation.choose(self._registry, demand)
        if pair is None:
            return None
        self._pairs[job.number] = pair
        computes = pair.prefill or pair.decode
        for worker in pair.workers:
            to_compute = uncached_tokens(worker, demand) if worker is computes else 0
            assignment = Assignment(
                prompt, demand.expected_tokens, begun=False, prompt_tokens=to_compute
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


class LeastLoaded:
    """The same rules in linear time: fewest prompt tokens queued, fewest sequences held.

    Colocated workers compare by both, in that order.
    """

    def __init__(self, placement: Placement, _: WorkerProfile) -> None:
        self._placement = placement
        self.queued = [0] * placement.prefill  # prompt tokens
        self._own = [0] * (placement.decode or placement.colocated)  # that decode computes
        self._held = [0] * (placement.decode or placement.colocated)  # sequences
        self._workers: dict[int, Workers] = {}

    def watch(self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool]) -> None:
        """See ``Route``. Caches play no part."""

    def choose(self, job: Job) -> Workers:
        """See ``Route``."""
        prefill = None
        if self._placement.colocated:
            loads = list(zip(self._own, self._held, strict=True))
            decode = loads.index(min(loads))
        else:
            decode = self._held.index(min(self._held))
            if not is_short(job.request, self._placement, self._held[decode], self._own[decode]):
                prefill = self.prefill_for(job)
        self._workers[job.number] = prefill, decode
        self._held[decode] += 1
        self._queue(job, job.request.prompt_tokens)
        return prefill, decode

    def prefill_for(self, job: Job) -> int:
        """The prefill worker of a pool."""
        return self.queued.index(min(self.queued))

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        self._queue(job, -job.request.prompt_tokens)

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        self._held[self._workers.pop(job.number)[1]] -= 1

    def _queue(self, job: Job, tokens: int) -> None:
        prefill, decode = self._workers[job.number]
        if prefill is None:
            self._own[decode] += tokens
        else:
            self.queued[prefill] += tokens


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
    seconds = profile.latency.step_seconds(LONG_PROMPT, LONG_PROMPT**2, 0, 0)
    geometry = KVGeometry(
        num_kv_heads=1, num_layers=1, block_size=size, head_dim=1, dtype="float32"
    )
    load = WorkerLoad(
        free_blocks=blocks,
        total_blocks=blocks,
        max_num_seqs=placement.max_num_seqs,
        prefill_tokens_per_second=LONG_PROMPT / seconds,
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
