"""The receiving half of the block protocol: arrived messages into the blocks of open grants.

Nothing is written to the arena but under an open grant, into the blocks the grant names, once for
each position. A message that no grant covers is taken off the wire unread and counted by reason:

    unknown_grant   no such grant, or one that is closed
    closing_grant   the grant is being closed
    out_of_range    positions past the grant's end, or none at all
    wrong_length    bytes that are not the rows of its positions
    duplicate       a position that has been received, or is being received
    not_adjacent    scattered blocks, or quantised ones, that do not fit a staging slot

A message stays unclaimed on the wire while ``max_in_flight`` others are under way: that is the
back-pressure. What one sender has under way is less than what is left free, of messages and of
staging slots (the dynamic threshold of Choudhury and Hahne, 1998); the rest of what it has offered
waits here. So a frozen sender leaves half of what it found to the others.

``close`` forbids new receives at once, and ``GrantClosed`` follows when none is under way; only
then may the blocks be used again. If a receive takes longer than ``stall`` seconds, or those of a
closing grant longer than ``closing_stall`` (a frozen sender, given up by all), whatever else
moves, every incoming connection is closed, which makes them fail; the other senders connect anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvtransfer.arena import Arena, Staging
from kvtransfer.config import TransferConfig
from kvtransfer.events import (
    BlocksReceived,
    Counters,
    GrantClosed,
    MessageRefused,
    ReceiveFailed,
    TransferEvent,
)
from kvtransfer.transport import AnyTransport, Buffer, Message, Operation, Rows
from kvtransfer.wire import Tag


@dataclass(slots=True)
class _Sender:
    """Who sends under some open grants, and what it may not have begun yet."""

    num_grants: int = 0
    under_way: int = 0  # messages not yet reported
    slots: int = 0  # staging slots they hold
    waiting: deque[tuple[Message, Tag]] = field(default_factory=deque)  # oldest first


@dataclass(slots=True)
class _Grant:
    blocks: Sequence[int]
    sender_name: bytes
    sender: _Sender
    taken: set[int] = field(default_factory=set)  # positions received, under way or waiting
    under_way: int = 0  # messages not yet reported
    closing: bool = False


@dataclass(frozen=True, slots=True)
class _Receiving:
    operation: Operation
    tag: Tag
    blocks: Sequence[int]  # destination
    slot: int | None  # staging slot it lands in
    num_bytes: int
    began: float


class Receiver:
    """Receives into ``arena``. Every call is made on the transfer thread."""

    def __init__(
        self,
        arena: Arena,
        transport: AnyTransport,
        config: TransferConfig,
        counters: Counters,
        report: Callable[[TransferEvent], None],
        catch_up: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``catch_up`` carries out the calls that wait for this thread, ``open`` among them."""
        self._arena = arena
        self._transport = transport
        self._config = config
        self._counters = counters
        self._report = report
        self._catch_up = catch_up
        self._clock = clock
        self._staging = Staging(arena, config.staging_slots, config.staging_bytes)
        self._nowhere = np.empty(0, np.uint8)  # too short for any message: nothing is written
        self._grants: dict[int, _Grant] = {}
        self._senders: dict[bytes, _Sender] = {}  # those of the grants
        self._closing: dict[int, float] = {}  # grants with receives under way: since when
        self._receiving: list[_Receiving] = []  # oldest first
        self._refusing: list[Operation] = []
        self._landed: deque[_Receiving] = deque()  # ended, to be scattered and digested

    @property
    def busy(self) -> bool:
        """Whether any message is under way."""
        return bool(self._receiving or self._refusing or self._landed)

    def open(self, grant_id: int, blocks: Sequence[int], sender_name: bytes) -> None:
        """Let position ``i`` of the grant be received into ``blocks[i]``, from one sender."""
        assert grant_id not in self._grants, f"grant {grant_id} opened twice"
        sender = self._senders.setdefault(sender_name, _Sender())
        sender.num_grants += 1
        self._grants[grant_id] = _Grant(blocks, sender_name, sender)
        self._counters.open_grants = len(self._grants)

    def close(self, grant_id: int) -> None:
        """Post no more receives for the grant; ``GrantClosed`` follows. Idempotent."""
        grant = self._grants.get(grant_id)
        if grant is not None and not grant.closing:
            grant.closing = True
            self._closing[grant_id] = self._clock()
            self._refuse_waiting(grant_id, grant.sender)
            self._close_if_idle(grant_id, grant)

    def step(self) -> bool:
        """Take what has ended, accept what has arrived, complete one; whether any was there."""
        moved = self._collect()
        moved |= self._accept()
        moved |= self._land()
        if self._stalled():
            self._transport.close_incoming()
        self._counters.receives_in_flight = len(self._receiving) + len(self._landed)
        return moved

    def _stalled(self) -> bool:
        now, config = self._clock(), self._config
        if self._closing and now - next(iter(self._closing.values())) > config.closing_stall:
            return True
        return bool(self._receiving) and now - self._receiving[0].began > config.stall

    def _collect(self) -> bool:
        self._refusing = [operation for operation in self._refusing if not operation.done]
        ended = [receiving for receiving in self._receiving if receiving.operation.done]
        for receiving in ended:
            self._receiving.remove(receiving)
            if receiving.operation.error is None:
                self._landed.append(receiving)
            else:
                self._lose(receiving, receiving.operation.error)
        return bool(ended)

    def _accept(self) -> bool:
        """Claim what has arrived, and begin what the senders' shares allow."""
        moved = self._begin_waiting()
        while self._num_free > 0 and (message := self._transport.probe()) is not None:
            moved = True
            tag = Tag.unpack(message.tag)
            reason = self._objection(tag, message)
            if reason is None:
                grant = self._grants[tag.grant_id]
                grant.taken.update(range(tag.first, tag.first + tag.count))
                grant.sender.waiting.append((message, tag))
                self._begin(grant.sender)
            else:
                self._refuse(message, tag, reason)
        return moved

    @property
    def _num_free(self) -> int:
        """Messages that may still be begun."""
        under_way = len(self._receiving) + len(self._refusing) + len(self._landed)
        return self._config.max_in_flight - under_way

    def _begin_waiting(self) -> bool:
        begun = [self._begin(sender) for sender in self._senders.values() if sender.waiting]
        return any(begun)

    def _begin(self, sender: _Sender) -> bool:
        """Receive what waits of one sender, up to its share; whether there was any."""
        begun = False
        while sender.waiting and sender.under_way < self._num_free:
            message, tag = sender.waiting[0]
            if not self._receive(message, tag):
                break
            sender.waiting.popleft()
            begun = True
        return begun

    def _refuse(self, message: Message, tag: Tag, reason: str) -> None:
        self._refusing.append(self._transport.receive(message, self._nowhere))
        self._counters.refused[reason] = self._counters.refused.get(reason, 0) + 1
        self._report(MessageRefused(tag.grant_id, reason))

    def _refuse_waiting(self, grant_id: int, sender: _Sender) -> None:
        """Take what waits for a closing grant off the wire."""
        waiting, sender.waiting = sender.waiting, deque()
        for message, tag in waiting:
            if tag.grant_id == grant_id:
                self._refuse(message, tag, "closing_grant")
            else:
                sender.waiting.append((message, tag))

    def _objection(self, tag: Tag, message: Message) -> str | None:
        if tag.grant_id not in self._grants:
            self._catch_up()  # the message may have overtaken the call that opens its grant
        grant = self._grants.get(tag.grant_id)
        if grant is None:
            return "unknown_grant"
        if grant.closing:
            return "closing_grant"
        positions = range(tag.first, tag.first + tag.count)
        if not positions or positions.stop > len(grant.blocks):
            return "out_of_range"
        row_bytes = self._arena.row_bytes if message.in_place else self._arena.wire_bytes
        if message.length != tag.count * row_bytes:
            return "wrong_length"
        if not grant.taken.isdisjoint(positions):
            return "duplicate"
        blocks = grant.blocks[tag.first : positions.stop]
        no_slot = tag.count > self._staging.rows_per_slot and not message.in_place
        if no_slot and not self._arena.is_straight(blocks):
            return "not_adjacent"
        return None

    def _receive(self, message: Message, tag: Tag) -> bool:
        """Begin to receive, unless that takes a staging slot that the sender may not have."""
        grant = self._grants[tag.grant_id]
        blocks, slot = grant.blocks[tag.first : tag.first + tag.count], None
        buffer: Buffer | Rows
        if message.in_place:
            buffer = Rows(self._arena.bytes, blocks)
        elif self._arena.is_straight(blocks):
            buffer = self._arena.run(blocks)
        elif grant.sender.slots < self._staging.num_free:
            slot = self._staging.acquire()
            grant.sender.slots += 1
            buffer = self._staging.buffer(slot, tag.count)
        else:
            return False
        grant.under_way += 1
        grant.sender.under_way += 1
        operation = self._transport.receive(message, buffer)
        began = self._clock()
        self._receiving.append(_Receiving(operation, tag, blocks, slot, message.length, began))
        return True

    def _land(self) -> bool:
        """Put one message's blocks in place and report them."""
        if not self._landed:
            return False
        receiving = self._landed.popleft()
        tag, grant = receiving.tag, self._grants[receiving.tag.grant_id]
        self._counters.messages_received += 1
        self._counters.bytes_received += receiving.num_bytes
        if not grant.closing:
            digests = receiving.operation.digests
            if receiving.slot is not None:
                digests = self._staging.scatter(receiving.slot, receiving.blocks)
            elif digests is None:
                digests = self._arena.digests(receiving.blocks)
            self._report(BlocksReceived(tag.grant_id, tag.first, digests))
        self._end(receiving, grant)
        return True

    def _lose(self, receiving: _Receiving, reason: str) -> None:
        tag, grant = receiving.tag, self._grants[receiving.tag.grant_id]
        grant.taken.difference_update(range(tag.first, tag.first + tag.count))
        self._counters.failed_receives += 1
        self._report(ReceiveFailed(tag.grant_id, reason))
        self._end(receiving, grant)

    def _end(self, receiving: _Receiving, grant: _Grant) -> None:
        if receiving.slot is not None:
            self._staging.release(receiving.slot)
            grant.sender.slots -= 1
        grant.under_way -= 1
        grant.sender.under_way -= 1
        if grant.closing:
            self._close_if_idle(receiving.tag.grant_id, grant)

    def _close_if_idle(self, grant_id: int, grant: _Grant) -> None:
        if grant.under_way == 0:
            del self._grants[grant_id]
            self._closing.pop(grant_id, None)
            grant.sender.num_grants -= 1
            if not grant.sender.num_grants:
                del self._senders[grant.sender_name]
            self._counters.open_grants = len(self._grants)
            self._report(GrantClosed(grant_id))
