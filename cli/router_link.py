"""A worker's link to one router: registers, tells its load, registers again when asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from protocol.link import Client
from protocol.messages import (
    Heartbeat,
    Leaving,
    Message,
    Register,
    RegisterAgain,
    Registered,
)

log = logging.getLogger(__name__)

RETRY = 0.5  # seconds between registrations until the router answers


class RouterLink:
    """``registration()`` describes the worker now; ``on_message`` gets all that is for its role."""

    def __init__(
        self,
        endpoint: str,
        identity: str,
        cluster_key: bytes | None,
        registration: Callable[[], Register],
        on_message: Callable[[str, Message], None],
    ) -> None:
        self.router_id: str | None = None  # known once registered
        self._client = Client(endpoint, identity, cluster_key)
        self._registration = registration
        self._on_message = on_message
        self._interval = RETRY

    def send(self, message: Message) -> None:
        """Queue a message for the router."""
        self._client.send(message)

    async def run(self) -> None:
        """Serve until cancelled; then tell the router that the worker leaves."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive())
                tasks.create_task(self._beat())
        finally:
            self._client.send(Leaving(epoch=self._registration().epoch))
            self._client.close()

    async def _beat(self) -> None:
        while True:
            registration = self._registration()
            if self.router_id is None:
                self._client.send(registration)
            else:
                self._client.send(Heartbeat(epoch=registration.epoch, load=registration.load))
            await asyncio.sleep(self._interval)

    async def _receive(self) -> None:
        while True:
            message = await self._client.receive()
            match message:
                case Registered():
                    self.router_id, self._interval = message.router_id, message.heartbeat_interval
                    log.info(
                        "registered with router %s at %s", self.router_id, self._client.endpoint
                    )
                case RegisterAgain():
                    self._client.send(self._registration())
                case _ if self.router_id is not None:
                    self._on_message(self.router_id, message)
