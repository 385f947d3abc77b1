"""How workers join, leave and are found dead: the router's side of the links, without requests.

A worker is lost when its connection is gone, which a killed process shows at the next heartbeat
sent to it, when nothing has been heard of it for ``SILENCE`` (a frozen one, or one whose host is
gone), or when one of its messages is missing: both ends count those about requests, and each
heartbeat tells the other end how many it must have received, so that what a broken connection
loses is noticed. A router that is late itself blames nobody: its own lateness is no silence
(``protocol.lateness``). A lost worker may come back at any time: nothing about it is remembered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from protocol.errors import WorkerNotFoundError
from protocol.link import Server
from protocol.messages import (
    Drain,
    Heartbeat,
    Leaving,
    Left,
    Message,
    Register,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    RouterHeartbeat,
)
from router.pools import Pools
from router.registry import Registry, Worker
from router.worker_states import WorkerState

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 0.25  # seconds, in both directions
SILENCE = 2.0  # seconds

MembershipMessage = Register | Heartbeat | Leaving | Left


class Membership:
    """Keeps ``registry`` true. ``on_lost(worker, left)`` hears of every worker that goes.

    ``left`` is whether it announced its going.
    """

    def __init__(
        self,
        link: Server,
        router_id: str,
        on_lost: Callable[[Worker, bool], None],
        clock: Callable[[], float],
    ) -> None:
        self.registry = Registry(SILENCE)
        self.pools = Pools(self.registry, lambda worker, ask: link.send(worker.peer, ask))
        self._link = link
        self._router_id = router_id
        self._on_lost = on_lost
        self._clock = clock

    def handle(self, peer: bytes, message: MembershipMessage) -> None:
        """Take a worker's message about itself."""
        now = self._clock()
        match message:
            case Register():
                self._register(peer, message, now)
            case Heartbeat():
                self._heartbeat(peer, message, now)
            case Leaving():
                self.registry.leave(peer, message.next_role)
            case Left(next_role=str(next_role)):
                worker = self.registry.end_role(peer, next_role)
                if worker is not None:
                    self._on_lost(worker, True)
            case Left():
                worker = self.registry.remove(peer)
                if worker is not None:
                    log.info("worker %s left", worker.worker_id)
                    self._on_lost(worker, True)

    def send(self, worker: Worker, message: Message) -> bool:
        """Send a message about a request; False if the worker cannot be reached."""
        worker.num_sent += 1
        return self._link.send(worker.peer, message)

    def sender(self, peer: bytes) -> Worker | None:
        """The worker from which a message about requests has come; None: it is not registered."""
        worker = self.registry.get(peer)
        if worker is not None:
            worker.num_received += 1
            worker.last_seen = self._clock()
        return worker

    def drain(self, worker_id: str) -> Worker:
        """Ask a worker to leave. Raises WorkerNotFoundError."""
        worker = self.registry.named(worker_id)
        if worker is None:
            raise WorkerNotFoundError(f"no worker {worker_id!r} is registered")
        self.registry.leave(worker.peer)
        self._link.send(worker.peer, Drain())
        return worker

    def lose(self, worker: Worker, reason: str) -> None:
        """Take a worker for dead."""
        if worker.state is not WorkerState.GONE:
            self.registry.remove(worker.peer)
            self._report(worker, reason)

    async def run(self) -> None:
        """Watch over the workers until cancelled."""
        while True:
            self.watch()
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    def watch(self) -> None:
        """Look after every worker once."""
        for worker in self.registry.all():
            if not self._beat(worker):
                self.lose(worker, "its connection is gone")
        for worker in self.registry.expire(self._clock()):
            self._report(worker, f"silent for {SILENCE:g} s")
        self.pools.step()

    def _beat(self, worker: Worker) -> bool:
        return self._link.send(worker.peer, RouterHeartbeat(num_sent=worker.num_sent))

    def _heartbeat(self, peer: bytes, message: Heartbeat, now: float) -> None:
        worker = self.registry.get(peer)
        if worker is not None and worker.num_received != message.num_sent:
            self.lose(worker, "messages from it were lost")
        if not self.registry.heartbeat(peer, message, now):
            self._link.send(peer, RegisterAgain())

    def _register(self, peer: bytes, info: Register, now: float) -> None:
        rival = self.registry.named(info.worker_id)
        if rival is not None and rival.peer != peer and rival.info.epoch != info.epoch:
            if self._beat(rival):
                other = f"pid {rival.info.pid} on {rival.info.host}"
                reason = f"another worker is registered as {info.worker_id}: {other}"
                self._link.send(peer, RegistrationRefused(reason=reason))
                return
            self.lose(rival, "its connection is gone")
        replaced = self.registry.register(peer, info, now)
        log.info("worker %s joined as %s", info.worker_id, info.role)
        answer = Registered(
            router_id=self._router_id,
            session=info.session,
            heartbeat_interval=HEARTBEAT_INTERVAL,
        )
        self._link.send(peer, answer)  # before any request: the worker ignores what comes earlier
        for worker in replaced:
            if worker.next_role is None:
                self._report(worker, "it dropped its work")
            else:
                self._on_lost(worker, True)

    def _report(self, worker: Worker, reason: str) -> None:
        log.warning("worker %s lost: %s", worker.worker_id, reason)
        self._on_lost(worker, False)
