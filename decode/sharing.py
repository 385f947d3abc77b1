"""Blocks that come once for several hand-offs: a grant counts on what another one receives.

Requests that begin alike and come at once get their grants before any of the KV is here. The first
is sent it. A later one refers to the same blocks, so that only the rest of it travels, and runs
once the first one's hand-off is verified; if that never happens, its KV is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from decode.grant import GrantState, OpenGrant
from engine.block_pool import BlockPool


def share(grant: OpenGrant, others: Iterable[OpenGrant], pool: BlockPool) -> None:
    """Let a grant that is about to open count on the best of ``others``, if one is of use.

    The blocks that were reserved for what it shares go back to the pool.
    """
    block_size = pool.block_size
    leaders = [other for other in others if _may_lead(other, grant, block_size)]
    leader = max(leaders, key=lambda other: _num_common(other, grant), default=None)
    count = _num_common(leader, grant) if leader is not None else 0
    if leader is None or count == 0:
        return
    table = grant.sequence.block_table
    first, end = _first(grant), _first(grant) + count
    shared = leader.sequence.block_table[first:end]
    pool.hold(shared)
    pool.release(table[first:end])
    grant.sequence.block_table = [*table[:first], *shared, *table[end:]]
    grant.num_held_tokens, grant.blocks = end * block_size, table[end:]
    grant.leader = leader
    leader.followers.append(grant)


def part(grant: OpenGrant) -> list[OpenGrant]:
    """A grant ends. Those that counted on it, for which all that they share is here, or lost.

    They may end with it. So where several grants hear of something, they hear of it first.
    """
    if grant.leader is not None:
        grant.leader.followers.remove(grant)
    for follower in grant.followers:
        follower.leader, follower.lost = None, not grant.whole
    return grant.followers


def _may_lead(other: OpenGrant, grant: OpenGrant, block_size: int) -> bool:
    """Whether what comes for ``other`` comes as soon as ``grant`` needs it.

    One prefill worker computes both, this one after that one and at most a block less. Who counts
    on another itself leads nobody, so that no end of a grant has a long tail.
    """
    no_later = other.sequence.num_tokens <= grant.sequence.num_tokens + block_size
    receives = other.state is GrantState.OPEN and other.leader is None
    return receives and no_later and other.peer == grant.peer


def _num_common(other: OpenGrant, grant: OpenGrant) -> int:
    """How many blocks both have, from the first on that ``grant`` lacks."""
    theirs, ours = other.sequence.block_hashes, grant.sequence.block_hashes
    first = last = _first(grant)
    while last < min(len(theirs), len(ours)) and theirs[last] == ours[last]:
        last += 1
    return last - first


def _first(grant: OpenGrant) -> int:
    """Index of the first block that is to come."""
    return len(grant.sequence.block_table) - len(grant.blocks)
