"""Which simulated workers serve a request: the router's own policy, or the same rule at scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.block_pool import BlockPool
from planner.job import Job
from planner.placement import Placement
from planner.profile import WorkerProfile
from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import Register, Role, WorkerLoad
from router.capacity import Demand, uncached_tokens
from router.policy import POLICIES, Pair, PolicyName, choose_pair
from router.registry import Assignment, Registry

LONG_PROMPT = 2048  # tokens, over which a worker's prefill rate is taken


class Route(Protocol):
    """Chooses workers and hears when they are done with a job. Workers go by their index."""

    def watch(self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool]) -> None:
        """The workers' block pools, before the first job."""

    def choose(self, job: Job) -> tuple[int, int] | None:
        """The prefill and the decode worker; None when the job must wait for another's end.

        For a colocated placement it is the same worker twice.
        """

    def prefilled(self, job: Job) -> None:
        """Prefill is done with the job."""

    def ended(self, job: Job) -> None:
        """Decode is done with the job."""


class RouterPolicy:
    """``router.policy.choose_pair`` over a registry.

    One router gives all the work and hears of each end at once, so its own count is never behind
    and load reports would add nothing. It hears of stored and evicted blocks at once, too.
    """

    def __init__(
        self, placement: Placement, profile: WorkerProfile, policy: PolicyName = "prefix-aware"
    ) -> None:
        self._policy = POLICIES[policy]
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

    def choose(self, job: Job) -> tuple[int, int] | None:
        """See ``Route``."""
        prompt = job.request.prompt_tokens
        num_blocks = (prompt - 1) // self._block_size
        keys = list(map(hash, job.sequence.block_hashes[:num_blocks]))
        demand = Demand(prompt, prompt + job.request.output_tokens, lambda _: keys)
        pair = choose_pair(self._registry, demand, policy=self._policy)
        if pair is None:
            return None
        self._pairs[job.number] = pair
        assert pair.prefill is not None, "choose_pair has both"
        to_compute = uncached_tokens(pair.prefill, demand)
        for worker, prompt_tokens in ((pair.prefill, to_compute), (pair.decode, 0)):
            assignment = Assignment(
                prompt, demand.expected_tokens, begun=False, prompt_tokens=prompt_tokens
            )
            self._registry.give(worker, str(job.number), assignment)
        return pair.prefill.info.epoch, pair.decode.info.epoch

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        prefill = self._pairs[job.number].prefill
        assert prefill is not None
        del prefill.assigned[str(job.number)]

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        del self._pairs.pop(job.number).decode.assigned[str(job.number)]


class _Findable:
    """A pool's listener: simulated blocks have names of any length, so their keys are whole."""

    def __init__(self, keys: set[int]) -> None:
        self._keys = keys

    def stored(self, block_hash: bytes, _: int) -> None:
        self._keys.add(hash(block_hash))

    def evicted(self, block_hash: bytes) -> None:
        self._keys.discard(hash(block_hash))


class LeastLoaded:
    """The same rule in linear time: fewest prompt tokens queued, fewest sequences held.

    Colocated workers compare by both, in that order.
    """

    def __init__(self, placement: Placement, _: WorkerProfile) -> None:
        self._colocated = placement.colocated > 0
        self.queued = [0] * (placement.prefill or placement.colocated)  # prompt tokens
        self._held = [0] * (placement.decode or placement.colocated)  # sequences
        self._pairs: dict[int, tuple[int, int]] = {}

    def watch(self, prefill: Sequence[BlockPool], decode: Sequence[BlockPool]) -> None:
        """See ``Route``. Caches play no part."""

    def choose(self, job: Job) -> tuple[int, int]:
        """See ``Route``."""
        if self._colocated:
            loads = list(zip(self.queued, self._held, strict=True))
            prefill = decode = loads.index(min(loads))
        else:
            prefill = self.prefill_for(job)
            decode = self._held.index(min(self._held))
        self._pairs[job.number] = prefill, decode
        self.queued[prefill] += job.request.prompt_tokens
        self._held[decode] += 1
        return prefill, decode

    def prefill_for(self, job: Job) -> int:
        """The prefill worker of a pool."""
        return self.queued.index(min(self.queued))

    def prefilled(self, job: Job) -> None:
        """See ``Route``."""
        self.queued[self._pairs[job.number][0]] -= job.request.prompt_tokens

    def ended(self, job: Job) -> None:
        """See ``Route``."""
        self._held[self._pairs.pop(job.number)[1]] -= 1


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
