"""The hand-offs that were accepted last, for a peer that has not heard so."""

from __future__ import annotations

from protocol.messages import Accepted, Handoff


class Acceptances:
    """Remembers up to ``capacity`` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._latest: dict[str, tuple[bytes, int]] = {}  # request to peer and grant id

    def accept(self, peer: bytes, handoff: Handoff) -> Accepted:
        """The answer to a hand-off that is accepted now."""
        self._latest[handoff.request_id] = peer, handoff.grant_id
        if len(self._latest) > self._capacity:
            del self._latest[next(iter(self._latest))]
        return _answer(handoff)

    def repeat(self, peer: bytes, handoff: Handoff) -> Accepted | None:
        """The answer that the hand-off has had already, if it has."""
        known = self._latest.get(handoff.request_id) == (peer, handoff.grant_id)
        return _answer(handoff) if known else None


def _answer(handoff: Handoff) -> Accepted:
    return Accepted(request_id=handoff.request_id, grant_id=handoff.grant_id)
