"""Blocks for requests that wait: who gets them, and in which order. Pure policy, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from decode.grant import OpenGrant
from engine.block_pool import BlockPool
from engine.sequence import Sequence


class Room:
    """Reserves blocks of the pool.

    ``headroom()`` is the scheduler's word on how many blocks a new grant must leave free, or None
    when newcomers have to wait.
    """

    def __init__(self, pool: BlockPool, headroom: Callable[[], int | None]) -> None:
        self._pool = pool
        self._headroom = headroom
        # Asked before a prompt of decode's own gets blocks: one that may not yet is passed over.
        self.may_start: Callable[[Sequence], bool] = lambda _: True

    def let_in(self, pending: Iterable[OpenGrant]) -> Iterator[OpenGrant]:
        """Reserve blocks while there is room, first come first served; yields who got them."""
        for grant in pending:
            own, sequence = grant.peer is None, grant.sequence
            if own and not self.may_start(sequence):
                continue
            headroom = self._headroom()
            cacheable = sequence.num_cacheable if own else sequence.num_tokens
            if headroom is None or not self._pool.reserve(sequence, cacheable, headroom):
                return
            yield grant
