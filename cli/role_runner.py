"""The role that a worker plays around its engine, and how it takes the other one.

    serving ──ChangeRole──> draining ──no work, or too late──> flipping ──nothing left──> serving

Weights, KV memory with its prefix cache, transfers and the links stay; the role is an object, and
each has an epoch of its own. The former one ends only when none of its sequences, leases, grants,
transfers and steps is left, so that nothing of it touches a block any more. A worker that is told
to leave meanwhile leaves.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from kvtransfer.events import TransferEvent
from protocol.messages import ChangeRole, Message, Role, WorkerLoad

log = logging.getLogger(__name__)

POLL = 0.02  # seconds


class PlayedRole(Protocol):
    """What a prefill and a decode worker have in common."""

    @property
    def idle(self) -> bool:
        """Whether it has no work."""

    def load(self) -> WorkerLoad:
        """What routers are told."""

    def metrics(self) -> Iterator[Metric]:
        """What only this role counts."""

    def leave(self) -> None:
        """Take nothing new."""

    def drop_router(self, router_id: str) -> None:
        """Drop everything that a router asked for."""

    def from_router(self, router_id: str, message: Message) -> None:
        """Take a router's message."""

    def from_transfer(self, event: TransferEvent) -> None:
        """Take an event of the transfer thread, on the event loop."""

    async def run(self) -> None:
        """Serve until cancelled."""


class Link(Protocol):
    """What is asked of a RouterLink."""

    def leave(self, next_role: Role | None = None) -> None:
        """Tell the router that the worker takes no new work."""

    def end_role(self, next_role: Role) -> None:
        """Give up the router's work, for the role ends."""

    def register_anew(self) -> None:
        """Tell the router that the worker is back."""


class RoleRunner:
    """Runs the role that ``build(role, epoch)`` gives, and its successors."""

    def __init__(
        self,
        role: Role,
        build: Callable[[Role, int], PlayedRole],
        *,
        in_step: Callable[[], bool],
        drain_timeout: float,
        metrics: CollectorRegistry,
    ) -> None:
        """``in_step`` says whether the engine computes; ``drain_timeout`` is in seconds."""
        self._build = build
        self._in_step = in_step
        self._drain_timeout = drain_timeout
        self._leaving = False
        self._begin(role)
        self._changes = Counter(
            "kvferry_role_changes", "Roles that this worker took", ["role"], registry=metrics
        )
        self._seconds = Histogram(
            "kvferry_role_change_seconds",
            "From the end of a role's drain until the next role serves",
            registry=metrics,
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
        )

    @property
    def idle(self) -> bool:
        """Whether the present role has no work."""
        return self.current.idle

    def load(self) -> WorkerLoad:
        """The present role's load."""
        return self.current.load()

    def metrics(self) -> Iterator[Metric]:
        """What only the present role counts."""
        return self.current.metrics()

    def from_router(self, router_id: str, message: Message) -> None:
        """Take a router's message."""
        self.current.from_router(router_id, message)

    def drop_router(self, router_id: str) -> None:
        """Drop everything that a router asked for."""
        self.current.drop_router(router_id)

    def change(self, asked: ChangeRole) -> None:
        """Take another role once the present one is drained; ignored if another epoch is meant."""
        meant = asked.epoch == self.epoch and asked.role != self.role
        if meant and not (self._leaving or self._asked.done()):
            self._asked.set_result(asked.role)

    def leave(self) -> None:
        """Take nothing new, and no other role."""
        self._leaving = True
        self.current.leave()

    async def run(self, links: Sequence[Link]) -> None:
        """Serve until cancelled; also ends when a worker that leaves has nothing left."""
        while not self._leaving:
            serving = asyncio.create_task(self.current.run())
            ending = asyncio.create_task(self._end_when_asked(links))
            try:
                done, _ = await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                drained = ending.result()
            finally:
                for task in (serving, ending):
                    task.cancel()
                await asyncio.gather(serving, ending, return_exceptions=True)
            if not self._leaving:
                self._flip(links, drained)

    async def _end_when_asked(self, links: Sequence[Link]) -> tuple[Role, float]:
        """Drain the role and end it; the next role, and when the drain was over."""
        role = await self._asked
        log.info(
            "from %s to %s: no new work, at most %g s for the rest",
            self.role,
            role,
            self._drain_timeout,
        )
        deadline = time.monotonic() + self._drain_timeout
        self.current.leave()
        for link in links:
            link.leave(role)
        await self._until(lambda: self.idle or time.monotonic() >= deadline)
        drained = time.monotonic()
        for link in links:
            link.end_role(role)
        await self._until(lambda: self.idle and not self._in_step())
        return role, drained

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Never, for a worker that leaves."""
        while True:
            if condition() and not self._leaving:
                return
            await asyncio.sleep(POLL)

    def _flip(self, links: Sequence[Link], ended: tuple[Role, float]) -> None:
        role, drained = ended
        self._begin(role)
        for link in links:
            link.register_anew()
        seconds = time.monotonic() - drained
        self._changes.labels(role=role).inc()
        self._seconds.observe(seconds)
        log.info("this worker is %s now, %.3f s after it was drained", role, seconds)

    def _begin(self, role: Role) -> None:
        self.role, self.epoch = role, secrets.randbits(63)
        self.current = self._build(role, self.epoch)
        self._asked: asyncio.Future[Role] = asyncio.get_running_loop().create_future()
