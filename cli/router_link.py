"""A worker's link to one router: registers, tells its load, drops the work of a lost router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.cache_feed import CacheFeed
from protocol.errors import ConfigError
from protocol.lateness import Lateness
from protocol.link import Client
from protocol.messages import (
    ChangeRole,
    Drain,
    FirstToken,
    Heartbeat,
    Leaving,
    Left,
    Message,
    Register,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    Role,
    RouterHeartbeat,
    SendCache,
    Tokens,
)

log = logging.getLogger(__name__)

RETRY = 0.5  # seconds between registrations until the router answers
SILENCE = 4.0  # seconds without a word until a router is lost
EARLY = 0.02  # seconds after a heartbeat until another one may come before its time
REFUSED = 5.0  # seconds of refusals until the worker gives up; a dead namesake is forgotten sooner


class WorkerRole(Protocol):
    """What a router asks a worker for."""

    def from_router(self, router_id: str, message: Message) -> None:
        """Take a router's message."""

    def drop_router(self, router_id: str) -> None:
        """Drop everything that a router asked for."""

    def change(self, asked: ChangeRole) -> None:
        """Take another role."""


class RouterLink:
    """``registration(session)`` describes the worker now; ``role`` gets all that is for it.

    ``feed`` knows what the router is still to be told of the worker's cache.

    The work of a router is dropped when the router says that it has given it up, when
    nothing is heard of the router for ``SILENCE``, and when one of its messages is missing.
    """

    def __init__(
        self,
        endpoint: str,
        identity: str,
        cluster_key: bytes | None,
        registration: Callable[[int], Register],
        role: WorkerRole,
        on_drain: Callable[[], None],
        feed: CacheFeed,
    ) -> None:
        self.router_id: str | None = None  # known while registered
        self._client = Client(endpoint, identity, cluster_key)
        self._registration = registration
        self._role = role
        self._on_drain = on_drain
        self._feed = feed
        self._session = 0
        self._num_sent = 0  # messages about requests in this session
        self._num_received = 0
        self._leaving = False
        self._interval = RETRY
        self._heard = 0.0  # time of the router's last message
        self._lateness = Lateness(SILENCE)
        self._refused: float | None = None  # since when
        self._told = 0.0  # time of the last heartbeat
        self._telling: asyncio.TimerHandle | None = None  # of an early one

    def send(self, message: Message) -> None:
        """Queue a message about a request, unless the router has lost the request meanwhile."""
        if self.router_id is not None:
            self._num_sent += 1
            self._client.send(message)

    def tell_early(self) -> None:
        """Tell the router the load and what has changed in the cache before the next heartbeat.

        What changes within ``EARLY`` of the last one waits for its end.
        """
        if self._telling is None:
            wait = max(0.0, self._told + EARLY - time.monotonic())
            self._telling = asyncio.get_running_loop().call_later(wait, self._tell)

    def leave(self, next_role: Role | None = None) -> None:
        """Tell the router that the worker takes no new work, until it is back in ``next_role``."""
        self._leaving = True
        self._client.send(Leaving(next_role=next_role))

    def end_role(self, next_role: Role) -> None:
        """Give up what is left of the router's work: it goes on elsewhere."""
        if self.router_id is not None:
            self._client.send(Left(next_role=next_role))
            self._role.drop_router(self.router_id)

    def register_anew(self) -> None:
        """Begin a session in another role."""
        self._leaving = False
        self._begin_session()

    async def run(self) -> None:
        """Serve until cancelled; then tell the router that the worker is gone.

        Raises ConfigError when the router keeps refusing the worker.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive())
                tasks.create_task(self._beat())
        finally:
            if self._telling is not None:
                self._telling.cancel()
            self._client.send(Left())
            self._client.close()

    async def _beat(self) -> None:
        while True:
            now = time.monotonic()
            self._heard = min(now, self._heard + self._lateness.look(now))
            if self.router_id is not None and now - self._heard > SILENCE:
                log.warning("router %s has been silent for %g s", self.router_id, SILENCE)
                self._lose_router()
            if self.router_id is not None:
                self._tell()
            elif not self._leaving:
                self._client.send(self._registration(self._session))
            await asyncio.sleep(self._interval)

    def _tell(self) -> None:
        """Send a heartbeat, after what has changed in the cache."""
        self._told = time.monotonic()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self.router_id is None:
            return
        changes = self._feed.take()
        if changes is not None:
            self._client.send(changes)
        registration = self._registration(self._session)
        heartbeat = Heartbeat(
            epoch=registration.epoch,
            load=registration.load,
            num_sent=self._num_sent,
            num_received=self._num_received,
        )
        self._client.send(heartbeat)

    async def _receive(self) -> None:
        while True:
            message = await self._client.receive()
            self._heard = time.monotonic()
            match message:
                case Registered() if message.session != self._session:
                    log.debug("an answer to a former registration")
                case Registered():
                    self._refused = None
                    self._feed.restart()
                    self.router_id, self._interval = message.router_id, message.heartbeat_interval
                    log.info(
                        "registered with router %s at %s", self.router_id, self._client.endpoint
                    )
                case RegistrationRefused():
                    self._check_refusal(message.reason)
                case RegisterAgain():
                    self._lose_router()
                case ChangeRole():
                    self._role.change(message)
                case SendCache():
                    self._feed.restart()
                case Drain():
                    self._on_drain()
                case RouterHeartbeat():
                    self._check_received(message.num_sent)
                case _ if self.router_id is not None:
                    self._num_received += 1
                    self._role.from_router(self.router_id, message)

    def _lose_router(self) -> None:
        """Drop the router's work and register anew, unless this is done already."""
        if self.router_id is None:
            return
        self._role.drop_router(self.router_id)
        self._begin_session()

    def _begin_session(self) -> None:
        self.router_id = None
        self._session += 1
        self._num_sent = self._num_received = 0
        self._interval = RETRY
        if not self._leaving:
            self._client.send(self._registration(self._session))

    def _check_received(self, num_sent: int) -> None:
        """Messages about requests are lost when a connection breaks: begin anew."""
        if self.router_id is not None and num_sent != self._num_received:
            lost = num_sent - self._num_received
            log.warning("%d messages of router %s were lost", lost, self.router_id)
            self._lose_router()

    def _check_refusal(self, reason: str) -> None:
        if self._refused is None:
            log.warning("the router at %s refuses this worker: %s", self._client.endpoint, reason)
            self._refused = self._heard
        elif self._heard - self._refused > REFUSED:
            raise ConfigError(reason)


def send_to(router_id: str, message: Message, links: Iterable[RouterLink]) -> None:
    """Send a message about a request to the router that has asked for it, if it is registered.

    The others hear at once what the end of a prompt or of a sequence leaves cached, and free: its
    next turn, or another request, may come through any of them.
    """
    ends = _ends_something(message)
    for link in links:
        if link.router_id == router_id:
            link.send(message)
        elif ends:
            link.tell_early()


def _ends_something(message: Message) -> bool:
    """Whether a prompt or a sequence has ended with it."""
    match message:
        case FirstToken():
            return True
        case Tokens():
            return any(update.finish_reason is not None for update in message.updates)
    return False
