"""A worker's link to a router: what a broken connection loses is noticed, and begun anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cli import router_link
from cli.router_link import RouterLink, send_to
from engine.block_pool import BlockPool
from engine.cache_feed import CacheFeed
from protocol.hashing import HASH_BYTES, KEY_BYTES
from protocol.link import Server
from protocol.messages import (
    CacheChanges,
    Cancel,
    ChangeRole,
    FinishReason,
    Heartbeat,
    Leaving,
    Left,
    Message,
    Register,
    RegisterAgain,
    Registered,
    RequestFailed,
    RouterHeartbeat,
    SendCache,
    Tokens,
    TokenUpdate,
)
from tests.router_scene import LOAD, SOON, registration

FAILED = RequestFailed(request_id="r#1", code="overloaded", message="full")


@dataclass
class Role:
    got: list[Message] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    changes: list[ChangeRole] = field(default_factory=list)

    def from_router(self, router_id: str, message: Message) -> None:
        self.got.append(message)

    def drop_router(self, router_id: str) -> None:
        self.dropped.append(router_id)

    def change(self, asked: ChangeRole) -> None:
        self.changes.append(asked)


class RouterEnd:
    """The router's end of the link, by hand."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peer = b""

    async def next(self, kind: type[Message], is_it: Callable[[Message], bool]) -> Message:
        async with asyncio.timeout(SOON):
            while True:
                self.peer, message = await self.server.receive()
                if isinstance(message, kind) and is_it(message):
                    return message

    async def register(
        self, session: int, heartbeat_interval: float = 0.02, router_id: str = "r"
    ) -> None:
        def is_it(message: Message) -> bool:
            return isinstance(message, Register) and message.session == session

        await self.next(Register, is_it)
        self.say(
            Registered(router_id=router_id, session=session, heartbeat_interval=heartbeat_interval)
        )

    async def heartbeat(self, num_sent: int) -> Heartbeat:
        def is_it(message: Message) -> bool:
            return isinstance(message, Heartbeat) and message.num_sent == num_sent

        message = await self.next(Heartbeat, is_it)
        assert isinstance(message, Heartbeat)
        return message

    def say(self, *messages: Message) -> None:
        for message in messages:
            assert self.server.send(self.peer, message)


def stand_still(seconds: float) -> None:
    """Keep the event loop, and all that runs on it, from running."""
    time.sleep(seconds)


@asynccontextmanager
async def linked(
    folder: Path, pool: BlockPool | None = None
) -> AsyncIterator[tuple[RouterEnd, RouterLink, Role]]:
    server, role = Server(f"ipc://{folder}/router.sock"), Role()

    def describe(session: int) -> Register:
        return registration("p0", session=session)

    feed = CacheFeed(pool or BlockPool(4, 4))
    link = RouterLink(server.endpoint, "p0", None, describe, role, lambda: None, feed)
    task = asyncio.create_task(link.run())
    try:
        yield RouterEnd(server), link, role
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


async def test_nothing_is_dropped_while_the_counts_agree(tmp_path: Path) -> None:
    async with linked(tmp_path) as (router, link, role):
        link.send(FAILED)  # of no use to a router that does not know the worker
        await router.register(session=0)
        await router.heartbeat(num_sent=0)
        router.say(Cancel(request_id="a"), RouterHeartbeat(num_sent=1), Cancel(request_id="b"))
        router.say(RouterHeartbeat(num_sent=2))
        link.send(FAILED)
        link.send(FAILED)
        while (await router.heartbeat(num_sent=2)).num_received < 2:
            pass
        assert role.got == [Cancel(request_id="a"), Cancel(request_id="b")]
        assert role.dropped == []


async def test_the_router_is_told_of_the_cache_and_again_when_it_asks(tmp_path: Path) -> None:
    def begins(message: Message) -> bool:
        return isinstance(message, CacheChanges) and message.number == 0

    async with linked(tmp_path) as (router, _, role):
        await router.register(session=0)
        await router.next(CacheChanges, begins)
        router.say(SendCache(), RouterHeartbeat(num_sent=0))
        await router.next(CacheChanges, begins)
        await router.heartbeat(num_sent=0)  # neither is a message about a request
        assert role.dropped == role.got == []


async def test_the_router_is_told_of_the_cache_early_but_not_of_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_link, "EARLY", 0.5)
    pool, names = BlockPool(4, 4), [bytes([number]) * HASH_BYTES for number in range(4)]
    async with linked(tmp_path, pool) as (router, link, _):
        await router.register(session=0, heartbeat_interval=10 * SOON)
        await router.heartbeat(num_sent=0)  # the next one is early
        told = []
        for block, name in enumerate(names):
            pool.name(block, name)
            link.tell_early()
            if block in (0, 3):
                message = await router.next(CacheChanges, lambda _: True)
                assert isinstance(message, CacheChanges)
                told.append(message.stored)
        assert told == [names[0][:KEY_BYTES], b"".join(name[:KEY_BYTES] for name in names[1:])]


@pytest.mark.parametrize("finish_reason", [None, "length"])
async def test_the_end_of_a_sequence_tells_the_other_routers_of_the_cache_and_the_load(
    tmp_path: Path, finish_reason: FinishReason | None
) -> None:
    pool = BlockPool(4, 4)
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    async with (
        linked(folders[0], pool) as (asking, asking_link, _),
        linked(folders[1], pool) as (other, other_link, _),
    ):
        for router, name in ((asking, "a"), (other, "b")):
            await router.register(session=0, heartbeat_interval=10 * SOON, router_id=name)
            await router.heartbeat(num_sent=0)  # the next one is early
        pool.name(0, bytes(HASH_BYTES))
        update = TokenUpdate(request_id="r#1", index=0, token_ids=[1], finish_reason=finish_reason)
        send_to("a", Tokens(updates=[update]), [asking_link, other_link])
        await asking.next(Tokens, lambda message: message == Tokens(updates=[update]))
        send_to("b", FAILED, [asking_link, other_link])
        told = [await other.next(Message, lambda _: True) for _ in range(3 if finish_reason else 1)]
        changes = CacheChanges(number=1, stored=bytes(KEY_BYTES), evicted=b"")
        heartbeat = Heartbeat(epoch=1, load=LOAD, num_sent=1, num_received=0)
        assert told == ([FAILED, changes, heartbeat] if finish_reason else [FAILED])


async def test_a_lost_message_of_the_router_ends_the_session(tmp_path: Path) -> None:
    async with linked(tmp_path) as (router, link, role):
        await router.register(session=0)
        await router.heartbeat(num_sent=0)
        link.send(FAILED)
        router.say(Cancel(request_id="a"), RouterHeartbeat(num_sent=2))  # the second was lost
        router.say(RouterHeartbeat(num_sent=2), Cancel(request_id="late"))
        await router.register(session=1)
        await router.heartbeat(num_sent=0)
        assert role.dropped == ["r"]
        router.say(RouterHeartbeat(num_sent=0), Cancel(request_id="b"))
        router.say(RouterHeartbeat(num_sent=1))
        await router.heartbeat(num_sent=0)
        await router.heartbeat(num_sent=0)
        assert role.dropped == ["r"]
        assert role.got == [Cancel(request_id="a"), Cancel(request_id="b")]


async def test_the_workers_own_lateness_is_not_the_routers_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_link, "SILENCE", 0.5)
    async with linked(tmp_path) as (router, _, role):
        await router.register(session=0)
        await router.heartbeat(num_sent=0)
        router.say(*[RouterHeartbeat(num_sent=0)] * 3)
        stand_still(1.5)
        await router.heartbeat(num_sent=0)
        await router.heartbeat(num_sent=0)
        assert role.dropped == []
        await router.register(session=1)  # now the router is silent
        assert role.dropped == ["r"]


async def test_an_answer_to_a_former_registration_is_not_the_present_sessions(
    tmp_path: Path,
) -> None:
    async with linked(tmp_path) as (router, _, role):
        await router.register(session=0)
        await router.heartbeat(num_sent=0)
        router.say(RegisterAgain())
        router.say(Registered(router_id="r", session=0, heartbeat_interval=0.02))
        router.say(Cancel(request_id="late"), RouterHeartbeat(num_sent=5))
        await router.register(session=1)
        router.say(RouterHeartbeat(num_sent=0))
        await router.heartbeat(num_sent=0)
        assert role.dropped == ["r"]
        assert role.got == []


async def test_a_role_ends_and_the_next_one_registers(tmp_path: Path) -> None:
    async with linked(tmp_path) as (router, link, role):
        await router.register(session=0)
        asked = ChangeRole(epoch=1, role="decode")
        router.say(asked)
        await router.heartbeat(num_sent=0)
        link.leave("decode")
        await router.next(Leaving, lambda m: m == Leaving(next_role="decode"))
        link.end_role("decode")
        await router.next(Left, lambda m: m == Left(next_role="decode"))
        assert role.changes == [asked]
        assert role.dropped == ["r"]
        link.register_anew()
        await router.register(session=1)
        router.say(Cancel(request_id="a"))
        await router.heartbeat(num_sent=0)
        await router.heartbeat(num_sent=0)
        assert role.got == [Cancel(request_id="a")]


async def test_a_worker_without_a_role_stays_away_from_a_new_router(tmp_path: Path) -> None:
    async with linked(tmp_path) as (router, link, _):
        await router.register(session=0)
        link.leave("decode")
        await router.next(Leaving, lambda m: True)
        router.say(RegisterAgain())
        link.end_role("decode")
        link.register_anew()
        message = await router.next(Message, lambda m: not isinstance(m, Heartbeat | Left))
        assert isinstance(message, Register)
