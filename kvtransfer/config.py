"""The bounds of one transfer thread. The two ends of a transfer may differ in all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Sizes are in bytes, times in seconds."""

    stage_below: int = 1 << 20  # scattered rows smaller than this are packed into messages
    staging_bytes: int = 2 << 20  # of a staging slot, and so of a packed message; at least one row
    staging_slots: int = 8  # on either side
    in_place_bytes: int = 16 << 20  # of a message that the peer copies; at least one row
    message_bytes: int = 4 << 20  # of any other message, but at least one row
    max_in_flight: int = 32  # messages to one peer, and messages being received
    stall: float = 30.0  # a peer that moves nothing, or one receive that lasts: connections end
    closing_stall: float = 5.0  # receives of a grant that nobody wants any more: likewise
