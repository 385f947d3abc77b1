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
        # Asked before a prompt of decode's own gets blocks, with the headroom: one that may not yet
        # is passed over.
        self.may_start: Callable[[Sequence, int], bool] = lambda _, __: True
        # How many blocks after its cached ones a tier brings back for a prompt that is handed off.
        self.loadable: Callable[[Sequence], int] = lambda _: 0

    def let_in(self, pending: Iterable[OpenGrant]) -> Iterator[OpenGrant]:
        """Reserve blocks while there is room; yields who got them.

        By priority, then first come first served.
        """
        for grant in sorted(pending, key=lambda grant: grant.sequence.priority):
            own, sequence = grant.peer is None, grant.sequence
            headroom = self._headroom()
            if headroom is None:
                return
            if own and not self.may_start(sequence, headroom):
                continue
            cacheable = sequence.num_cacheable if own else sequence.num_tokens
            if not self._pool.reserve(sequence, cacheable, headroom):
                return
            if not own:
                self._divide(grant)
            yield grant

    def _divide(self, grant: OpenGrant) -> None:
        """Decide which of its blocks a tier fills, and which prefill."""
        sequence = grant.sequence
        grant.num_to_load = self.loadable(sequence)
        num_held = sequence.num_computed // self._pool.block_size + grant.num_to_load
        grant.num_held_tokens = num_held * self._pool.block_size
        grant.blocks = sequence.block_table[num_held:]
