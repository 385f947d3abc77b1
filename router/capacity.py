"""What a worker can still take, from what it was given and what it last reported. Pure functions.

A report is up to a heartbeat old, so what was given since counts beside it; what other routers
gave shows only in reports. Decode's KV is promised at dispatch for the whole expected length,
before prefill computes anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.registry import Assignment, Worker

LOOK_AHEAD = 0.5  # seconds of work that a prefill worker is given in advance
MIN_PROMPTS = 2  # that it may always have: prefill shares a step between a long and a short one


@dataclass(frozen=True, slots=True)
class Demand:
    """What an attempt takes: tokens to prefill, and how many there will be at the end."""

    num_tokens: int
    expected_tokens: int


def queued_tokens(prefill: Worker) -> int:
    """Tokens that a prefill worker has yet to compute.

    Two upper bounds, of which the first knows at once what ended and the second how far a prompt
    has come.
    """
    unreported = sum(a.num_tokens for a in prefill.assigned.values() if not a.reported)
    return min(
        prefill.assigned_tokens + prefill.foreign_tokens, prefill.load.waiting_tokens + unreported
    )


def takes_prompt(prefill: Worker) -> bool:
    """Whether a prefill worker would soon begin another prompt. An unmeasured one would."""
    rate = prefill.load.prefill_tokens_per_second
    if len(prefill.assigned) < MIN_PROMPTS or rate == 0:
        return True
    return queued_tokens(prefill) < LOOK_AHEAD * rate


def held_sequences(decode: Worker) -> int:
    """Sequences that a decode worker has or was promised."""
    return len(decode.assigned) + decode.foreign_sequences


def free_blocks(decode: Worker) -> int:
    """KV blocks of a decode worker that nobody has or was promised; below 0: too many were."""
    promised = sum(_blocks_to_come(decode, a) for a in decode.assigned.values())
    return decode.load.free_blocks + decode.returned_blocks - promised


def takes_sequence(decode: Worker, demand: Demand) -> bool:
    """Whether a decode worker has a slot and KV for another sequence.

    Alone there every sequence fits: a pool holds at least one of the longest.
    """
    if decode.full:
        return False
    held = held_sequences(decode)
    needed = decode.blocks_for(demand.expected_tokens)
    return held == 0 or (held < decode.load.max_num_seqs and needed <= free_blocks(decode))


def _blocks_to_come(decode: Worker, assignment: Assignment) -> int:
    """Promised blocks that are still free in the worker's report."""
    expected = decode.blocks_for(max(assignment.expected_tokens, assignment.num_tokens))
    taken = decode.blocks_for(assignment.num_tokens) if assignment.reported else 0
    return expected - taken
