"""What a transfer thread reports to its owner, and what it counts.

A ``grant_id`` names a promise of the receiving side: position ``i`` of the grant may be written
into one fixed block. ``first`` is a position within the grant.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlocksReceived:
    """Positions ``first ..`` are in place; ``digests`` has one entry for each of them."""

    grant_id: int
    first: int
    digests: list[int]


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """A message for the grant had begun to arrive and was lost; its blocks hold garbage."""

    grant_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class GrantClosed:
    """Nothing writes under the grant any more: its blocks may be used again."""

    grant_id: int


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """The batch that began at ``first`` is sent: its source blocks may be used again.

    That they have arrived is the receiver's to say. ``digests`` has one entry for each block of
    the batch, of the bytes that travelled.
    """

    grant_id: int
    first: int
    digests: list[int]


@dataclass(frozen=True, slots=True)
class SendFailed:
    """The batch that began at ``first`` is given up: its source blocks may be used again."""

    grant_id: int
    first: int
    reason: str


@dataclass(frozen=True, slots=True)
class MessageRefused:
    """A message arrived that no grant covers; nothing of it was written to the arena."""

    grant_id: int
    reason: str  # a key of Counters.refused


@dataclass(frozen=True, slots=True)
class Died:
    """The transfer thread ended by an error, and with it everything that was under way."""

    reason: str


TransferEvent = (
    BlocksReceived | ReceiveFailed | GrantClosed | BlocksSent | SendFailed | MessageRefused | Died
)


@dataclass(slots=True)
class Counters:
    """Totals since the start, and gauges of now. Written by the transfer thread only."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    failed_sends: int = 0  # batches
    failed_receives: int = 0  # messages
    refused: dict[str, int] = field(default_factory=dict)  # messages, by reason
    strangers: int = 0  # peers that were hung up on
    open_grants: int = 0
    sends_in_flight: int = 0  # messages
    receives_in_flight: int = 0  # messages
    connections: dict[str, str] = field(default_factory=dict)  # peer -> transports it uses
