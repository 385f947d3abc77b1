"""The workers a router knows: who they are, how loaded, and which requests they hold.

Pure state with the clock passed in. A worker is known by its id and its epoch; state about it
dies with its epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from protocol.messages import Heartbeat, Register, Role, WorkerLoad


class WorkerState(Enum):
    """What a worker may be asked for."""

    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(slots=True, eq=False)
class Worker:
    """One registered worker. ``assigned`` maps requests to their prompt tokens."""

    peer: bytes
    info: Register
    load: WorkerLoad
    last_seen: float
    state: WorkerState = WorkerState.SERVING
    assigned: dict[str, int] = field(default_factory=dict)

    @property
    def worker_id(self) -> str:
        """The id the worker registered under."""
        return self.info.worker_id

    @property
    def assigned_tokens(self) -> int:
        """Prompt tokens of the requests this router gave it."""
        return sum(self.assigned.values())


class Registry:
    """Workers by their link identity."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout  # seconds without a heartbeat until a worker is lost
        self._workers: dict[bytes, Worker] = {}

    def all(self) -> list[Worker]:
        """Every known worker, in order of registration."""
        return list(self._workers.values())

    def get(self, peer: bytes) -> Worker | None:
        """The worker behind a link identity."""
        return self._workers.get(peer)

    def serving(self, role: Role) -> list[Worker]:
        """Workers of a role that take new requests."""
        return [
            worker
            for worker in self._workers.values()
            if worker.info.role == role and worker.state is WorkerState.SERVING
        ]

    def register(self, peer: bytes, info: Register, now: float) -> list[Worker]:
        """Take a worker in. Returns the workers it replaces: those of its former epochs.

        A repeated registration of the same epoch keeps what the worker holds.
        """
        known = self._workers.get(peer)
        if known is not None and known.info.epoch == info.epoch:
            known.info, known.load, known.last_seen = info, info.load, now
            return []
        workers = self._workers.values()
        replaced = [w for w in workers if w.worker_id == info.worker_id or w.peer == peer]
        for worker in replaced:
            del self._workers[worker.peer]
        self._workers[peer] = Worker(peer, info, info.load, now)
        return replaced

    def heartbeat(self, peer: bytes, message: Heartbeat, now: float) -> bool:
        """Note a sign of life; False if the sender is not registered."""
        worker = self._workers.get(peer)
        if worker is None or worker.info.epoch != message.epoch:
            return False
        worker.load, worker.last_seen = message.load, now
        return True

    def leave(self, peer: bytes) -> None:
        """The worker takes no new requests."""
        worker = self._workers.get(peer)
        if worker is not None:
            worker.state = WorkerState.LEAVING

    def expire(self, now: float) -> list[Worker]:
        """Remove and return the workers that have been silent for too long."""
        lost = [w for w in self._workers.values() if now - w.last_seen > self._timeout]
        for worker in lost:
            del self._workers[worker.peer]
        return lost
