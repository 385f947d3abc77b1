"""When a grant is refused, and in which words. A pure function."""

from __future__ import annotations

from protocol.messages import Grant


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
