"""Which prefill and decode worker serve a request: filter, score, pick. Pure functions.

    filter   serving workers with room for it (``router.capacity``)
    score    a ``Policy``: how good each of those is, the smallest first
    pick     the best two whose KV fits together; among equals the one that has waited longest

Load is what the router itself dispatched beside what the worker reported (other routers may
serve the same pools): a burst between two heartbeats is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from random import Random
from typing import Literal

from protocol.errors import UnavailableError
from router.capacity import (
    Demand,
    free_blocks,
    held_sequences,
    queued_tokens,
    takes_prompt,
    takes_sequence,
    uncached_tokens,
)
from router.registry import Registry, Worker

OTHERS = 0.5  # tokens that each token to compute costs those who come next
SPREAD = 1.25  # times the mean of sequences that a decode worker may hold and still be preferred
SLACK = 3  # sequences more, of a prompt all of which it holds: chats come in any order

PolicyName = Literal["prefix-aware", "least-loaded", "power-of-two", "round-robin"]
Key = Callable[[Worker], tuple[float, ...]]
Score = Callable[[Sequence[Worker], Demand], Key]
"""The key by which the workers of a pool are compared for a demand: the smallest is the best."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How to score workers that compute a prompt, and workers that continue the sequence."""

    prompt: Score
    sequence: Score


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one request. Without ``prefill`` decode computes the prompt itself."""

    prefill: Worker | None
    decode: Worker

    @property
    def workers(self) -> list[Worker]:
        """All of them."""
        return [worker for worker in (self.prefill, self.decode) if worker is not None]


# Scores --------------------------------------------------------------------------------------


def in_turn(_: Sequence[Worker], __: Demand) -> Key:
    """All are equal."""
    return lambda worker: ()


def by_queue(_: Sequence[Worker], __: Demand) -> Key:
    """The fewest prompt tokens to compute."""
    return lambda worker: (queued_tokens(worker),)


def by_sequences(_: Sequence[Worker], __: Demand) -> Key:
    """The fewest sequences, then the most free blocks."""
    return lambda worker: (held_sequences(worker), -free_blocks(worker))


def of_two(score: Score) -> Score:
    """The better of two that are drawn at random (Mitzenmacher, 2001).

    The draw depends on the workers' turns alone, which change with every dispatch.
    """

    def scored(pool: Sequence[Worker], demand: Demand) -> Key:
        drawn = Random(sum(worker.turn for worker in pool)).sample(pool, min(2, len(pool)))
        key = score(pool, demand)
        return lambda worker: (worker not in drawn, *key(worker))

    return scored


def by_completion(_: Sequence[Worker], demand: Demand) -> Key:
    """The earliest end of the prompt: what is queued, then what is not cached of the prompt itself.

    In tokens, since the workers of a pool are equally fast. What is computed also delays whoever
    comes next, so a cached prefix is worth ``1 + OTHERS`` times as much queue as computing it
    takes: prompts that begin alike and come at once go together, until that takes so much longer.
    """

    def key(worker: Worker) -> tuple[float, ...]:
        uncached = uncached_tokens(worker, demand)
        return queued_tokens(worker) + (1 + OTHERS) * uncached, uncached

    return key


def by_transfer(pool: Sequence[Worker], demand: Demand) -> Key:
    """The least KV to move, among workers with few enough sequences; else the fewest sequences.

    Few enough is ``SPREAD`` times the mean and ``SLACK`` times the square of the share of the
    prompt that the worker holds: a beginning that all prompts have in common draws nobody.
    Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018), where the
    cache decides in place of a hash.
    """
    mean = (sum(map(held_sequences, pool)) + 1) / max(1, len(pool))

    def key(worker: Worker) -> tuple[float, ...]:
        held, uncached = held_sequences(worker), uncached_tokens(worker, demand)
        share = 1 - uncached / demand.num_tokens
        over = held + 1 > SPREAD * mean + SLACK * share**2
        return over, 0 if over else uncached, held, -free_blocks(worker)

    return key


POLICIES: dict[PolicyName, Policy] = {
    "prefix-aware": Policy(by_completion, by_transfer),
    "least-loaded": Policy(by_queue, by_sequences),
    "power-of-two": Policy(of_two(by_queue), of_two(by_sequences)),
    "round-robin": Policy(in_turn, in_turn),
}
DEFAULT = POLICIES["prefix-aware"]


# Picks ---------------------------------------------------------------------------------------


def check_serving(registry: Registry) -> None:
    """Raise UnavailableError, naming the pool or field at fault, when no pair serves at all."""
    prefills, decodes = registry.serving("prefill"), registry.serving("decode")
    for name, pool in (("prefill", prefills), ("decode", decodes)):
        if not pool:
            raise UnavailableError(f"no {name} worker is serving")
    if _first_pair(prefills, decodes) is None:
        difference = prefills[0].info.fingerprint.difference(decodes[0].info.fingerprint)
        message = "no prefill and decode workers whose KV fits together"
        raise UnavailableError(f"{message}: {difference}")


def choose_pair(
    registry: Registry, demand: Demand, avoid: Set[str] = frozenset(), policy: Policy = DEFAULT
) -> Pair | None:
    """The best workers with room for the demand whose KV fits together, or None.

    Workers whose id is in ``avoid`` are taken only where no others have room.
    """
    prefills = [w for w in registry.serving("prefill") if takes_prompt(w, demand)]
    decodes = [w for w in registry.serving("decode") if takes_sequence(w, demand)]
    return _first_pair(
        _best_first(prefills, avoid, policy.prompt(prefills, demand)),
        _best_first(decodes, avoid, policy.sequence(decodes, demand)),
    )


def choose_decode(
    registry: Registry, demand: Demand, avoid: Set[str] = frozenset(), policy: Policy = DEFAULT
) -> Worker | None:
    """The best decode worker with room for a request whose prompt it computes, or None."""
    decodes = [
        w
        for w in registry.serving("decode")
        if takes_sequence(w, demand) and takes_prompt(w, demand)
    ]
    prompt, sequence = policy.prompt(decodes, demand), policy.sequence(decodes, demand)
    best = _best_first(decodes, avoid, lambda worker: (*prompt(worker), *sequence(worker)))
    return best[0] if best else None


def _best_first(pool: list[Worker], avoid: Set[str], key: Key) -> list[Worker]:
    return sorted(pool, key=lambda w: (w.worker_id in avoid, key(w), w.turn))


def _first_pair(prefills: list[Worker], decodes: list[Worker]) -> Pair | None:
    for prefill in prefills:
        for decode in decodes:
            if prefill.info.fingerprint == decode.info.fingerprint:
                return Pair(prefill, decode)
    return None
