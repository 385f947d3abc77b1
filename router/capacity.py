"""What a worker can still take, from what it was given and what it last reported. Pure functions.

A report is up to a heartbeat old, so what was given since counts beside it; what other routers
gave shows only in reports. Decode's KV is promised at dispatch for the whole expected length,
before prefill computes anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.cached_blocks import PrefixKeys, no_prefix
from router.registry import Worker

LOOK_AHEAD = 0.5  # seconds of prompts that a worker is given in advance
MIN_PROMPTS = 2  # that it may always have: a step is shared between a long and a short one


@dataclass(frozen=True, slots=True)
class Demand:
    """What an attempt takes: tokens to prefill, and how many there will be at the end."""

    num_tokens: int
    expected_tokens: int
    prefix: PrefixKeys = no_prefix


def cached_tokens(worker: Worker, demand: Demand) -> int:
    """Leading tokens of the demand whose KV the worker holds, in whole blocks."""
    fingerprint = worker.info.fingerprint
    return worker.cached.leading(demand.prefix(fingerprint)) * fingerprint.geometry.block_size


def uncached_tokens(worker: Worker, demand: Demand) -> int:
    """The rest of the demand's tokens: at least the last one."""
    return demand.num_tokens - cached_tokens(worker, demand)


def queued_tokens(worker: Worker) -> int:
    """Prompt tokens that a worker of either role has yet to compute.

    Two upper bounds, of which the first knows at once what ended and the second how far a prompt
    has come.
    """
    return min(
        worker.assigned_tokens + worker.foreign_tokens,
        worker.load.waiting_tokens + worker.unreported_tokens,
    )


def takes_prompt(worker: Worker, demand: Demand) -> bool:
    """Whether a worker would soon begin another prompt. An unmeasured one would.

    "Soon" is later where the worker holds a part of the prompt: waiting behind as many tokens as
    it holds takes no longer than computing them elsewhere.
    """
    rate = worker.load.prefill_tokens_per_second
    if worker.num_prompts < MIN_PROMPTS or rate == 0:
        return True
    return queued_tokens(worker) < LOOK_AHEAD * rate + cached_tokens(worker, demand)


def held_sequences(decode: Worker) -> int:
    """Sequences that a decode worker has or was promised."""
    return len(decode.assigned) + decode.foreign_sequences


def free_blocks(decode: Worker) -> int:
    """KV blocks of a decode worker that nobody has or was promised; below 0: too many were."""
    return decode.load.free_blocks + decode.returned_blocks - decode.promised_blocks


def takes_sequence(decode: Worker, demand: Demand) -> bool:
    """Whether a decode worker has a slot and KV for another sequence.

    Alone there every sequence fits: a pool holds at least one of the longest.
    """
    if decode.full:
        return False
    held = held_sequences(decode)
    needed = decode.blocks_for(demand.expected_tokens)
    return held == 0 or (held < decode.load.max_num_seqs and needed <= free_blocks(decode))
