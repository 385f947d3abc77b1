"""When a prompt or a grant is refused, and in which words. Pure functions."""

from __future__ import annotations

from engine.block_pool import BlockPool
from engine.sequence import Sequence
from protocol.errors import ContextLengthError, InvalidRequestError, KvferryError
from protocol.messages import Grant


def misfit(sequence: Sequence, pool: BlockPool) -> KvferryError | None:
    """Why a worker with this pool can never run the prompt; None if it can."""
    unfit = sequence.objection()
    if unfit is not None:
        return InvalidRequestError(unfit)
    needed = pool.blocks_for(sequence.num_tokens)
    if needed > pool.num_blocks:
        message = f"needs {needed} KV blocks, the prefill pool has {pool.num_blocks}"
        return ContextLengthError(message)
    return None


def objection(grant: Grant, epoch: int, num_tokens: int, block_size: int) -> str | None:
    """Why a grant asked of ``epoch`` cannot take the KV of ``num_tokens``; None if it can."""
    if grant.epoch != epoch:
        return f"epoch {grant.epoch}, asked of {epoch}"
    if grant.num_cached_tokens % block_size:
        return f"num_cached_tokens {grant.num_cached_tokens}, with blocks of {block_size} tokens"
    held = grant.num_cached_tokens // block_size + len(grant.blocks)
    needed = -(-num_tokens // block_size)
    if held != needed or grant.num_cached_tokens > num_tokens:
        return f"{held} blocks, the sequence has {needed}"
    return None
