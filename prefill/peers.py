"""Links to the decode workers that prompts are handed off to, each opened when first needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count

from prefill.handoff_events import Answer
from protocol.link import Client
from protocol.messages import Accepted, Grant, GrantRefused, Message, PeerAddress

log = logging.getLogger(__name__)


class DecodePeers:
    """All of one prefill worker. ``receive(worker_id, answer)`` takes what they answer.

    Their tasks run in ``tasks``.
    """

    def __init__(
        self,
        identity: str,
        cluster_key: bytes | None,
        tasks: asyncio.TaskGroup,
        receive: Callable[[str, Answer], None],
    ) -> None:
        self._identity = identity
        self._cluster_key = cluster_key
        self._tasks = tasks
        self._receive = receive
        self._links: dict[str, tuple[int, Client, asyncio.Task[None]]] = {}  # by worker id
        self._numbers = count()

    def send(self, address: PeerAddress, message: Message) -> None:
        """To the worker at the address; a link to its former incarnation is closed."""
        self._link(address).send(message)

    def close(self) -> None:
        """Close all links."""
        for _, link, _ in self._links.values():
            link.close()

    def _link(self, address: PeerAddress) -> Client:
        known = self._links.get(address.worker_id)
        if known is not None:
            epoch, link, task = known
            if epoch == address.epoch:
                return link
            task.cancel()
            link.close()
        # A new name for each link: the former one may still be reconnecting to the same address.
        identity = f"{self._identity}:{next(self._numbers)}"
        link = Client(address.control, identity, self._cluster_key)
        task = self._tasks.create_task(self._listen(address.worker_id, link))
        self._links[address.worker_id] = (address.epoch, link, task)
        return link

    async def _listen(self, worker_id: str, link: Client) -> None:
        while True:
            message = await link.receive()
            if isinstance(message, Grant | GrantRefused | Accepted):
                self._receive(worker_id, message)
            else:
                log.warning("unexpected %s from decode", type(message).__name__)
