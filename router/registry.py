"""The workers a router knows: who they are, how loaded, and which attempts they hold.

Pure state with the clock passed in. A worker is known by its id and its epoch; state about it
dies with its epoch, or with its session: when it has dropped the router's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.lateness import Lateness
from protocol.messages import Heartbeat, Register, Role, WorkerLoad
from router.cached_blocks import CachedBlocks
from router.worker_states import TRANSITIONS, WorkerEvent, WorkerState


@dataclass(slots=True)
class Assignment:
    """An attempt that a worker was given."""

    num_tokens: int  # of the prompt and of the output so far
    expected_tokens: int  # in the end
    begun: bool  # it takes room on the worker
    prompt_tokens: int = 0  # that the worker computes and has not cached, until its first token
    prefix: Sequence[int] = ()  # keys of the blocks that it will have cached then
    number: int = 0  # of the message that brings it to the worker; 0: none does
    reported: bool = False  # and the worker's load includes it
    taken_blocks: int = 0  # by the worker's load
    coming_blocks: int = 0  # promised beside those


@dataclass(slots=True, eq=False)
class Worker:
    """One registered worker and the attempts it holds, by id.

    What they sum up to is kept, since every request compares all workers.
    """

    peer: bytes
    info: Register
    last_seen: float
    load: WorkerLoad = field(init=False)
    state: WorkerState = WorkerState.SERVING
    next_role: Role | None = None  # in which it will come back, as it says
    assigned: dict[str, Assignment] = field(default_factory=dict)
    turn: int = 0  # the dispatch with which it was last given an attempt
    cached: CachedBlocks = field(default_factory=CachedBlocks)
    full: bool = False  # it refused a request; its next report tells why
    foreign_tokens: int = 0  # prompt tokens that other routers queued there
    foreign_sequences: int = 0
    returned_blocks: int = 0  # by attempts that have ended since the last report
    # Of the attempts that this router gave it:
    num_prompts: int = 0  # to compute
    assigned_tokens: int = 0  # of those prompts
    unreported_tokens: int = 0  # of those that its load does not include
    promised_blocks: int = 0  # that they are yet to take
    num_sent: int = 0  # messages about requests, to the worker
    num_received: int = 0  # and from it

    def __post_init__(self) -> None:
        self.report(self.info.load)

    @property
    def worker_id(self) -> str:
        """The id the worker registered under."""
        return self.info.worker_id

    def advance(self, event: WorkerEvent, next_role: Role | None = None) -> None:
        """Go by ``router.worker_states``. Raises ValueError for what cannot be in this state."""
        state = TRANSITIONS[self.state].get(event)
        if state is None:
            raise ValueError(f"worker {self.worker_id}: {event.name} while {self.state.name}")
        self.state, self.next_role = state, next_role

    def blocks_for(self, num_tokens: int) -> int:
        """KV blocks that hold ``num_tokens`` tokens."""
        return self.info.fingerprint.geometry.blocks_for(num_tokens)

    def report(self, load: WorkerLoad, num_received: int = 0) -> None:
        """The worker has told its load, of when it had received so many messages."""
        self.load, self.full, self.returned_blocks = load, False, 0
        self.told_cache()
        self.foreign_sequences = max(0, load.num_promised - len(self.assigned))
        for assignment in self.assigned.values():
            self._count(assignment, -1)
            assignment.reported |= assignment.begun and assignment.number <= num_received
            self._promise(assignment)
            self._count(assignment, 1)
        # Workers report prompts that wait as a whole: what is cached shows when they start.
        prompts = (a for a in self.assigned.values() if a.prompt_tokens and a.reported)
        own = sum(a.num_tokens if load.num_waiting else a.prompt_tokens for a in prompts)
        self.foreign_tokens = max(0, load.waiting_tokens - own)

    def told_cache(self) -> None:
        """The worker has told of all blocks that it has by now."""
        self.cached.reported(a.prefix for a in self.assigned.values())

    def give(self, attempt_id: str, assignment: Assignment) -> None:
        """It is given an attempt, which counts from now on."""
        self.assigned[attempt_id] = assignment
        self.cached.expect(assignment.prefix)
        self._promise(assignment)
        self._count(assignment, 1)

    def goes_on(self, attempt_id: str, num_tokens: int) -> None:
        """An attempt, if it is there, has generated tokens: its prompt is computed."""
        assignment = self.assigned.get(attempt_id)
        if assignment is None:
            return
        assignment.num_tokens, assignment.begun = num_tokens, True
        if assignment.prompt_tokens:
            self._count(assignment, -1)
            assignment.prompt_tokens, assignment.prefix = 0, ()
            self._count(assignment, 1)

    def end(self, attempt_id: str) -> None:
        """An attempt is over on this worker, if it was there."""
        assignment = self.assigned.pop(attempt_id, None)
        if assignment is not None:
            self._count(assignment, -1)
            self.returned_blocks += assignment.taken_blocks

    def _promise(self, assignment: Assignment) -> None:
        num_tokens = assignment.num_tokens
        needed = self.blocks_for(max(assignment.expected_tokens, num_tokens))
        assignment.taken_blocks = self.blocks_for(num_tokens) if assignment.reported else 0
        assignment.coming_blocks = needed - assignment.taken_blocks

    def _count(self, assignment: Assignment, sign: int) -> None:
        self.promised_blocks += sign * assignment.coming_blocks
        if assignment.prompt_tokens:
            self.num_prompts += sign
            self.assigned_tokens += sign * assignment.prompt_tokens
            if not assignment.reported:
                self.unreported_tokens += sign * assignment.prompt_tokens

    def row(self) -> dict[str, Any]:
        """The worker as ``GET /admin/workers`` shows it."""
        info = self.info
        return {
            "id": info.worker_id,
            "role": info.role,
            "state": self.state.value,
            "next_role": self.next_role,
            "pid": info.pid,
            "host": info.host,
            "address": info.control,
            "data_address": info.data.decode(errors="replace"),
            "metrics": info.metrics,
            "model": info.model,
            "epoch": info.epoch,
            "transport": info.transport,
            "block_size": info.fingerprint.geometry.block_size,
            "block_bytes": info.fingerprint.geometry.row_bytes,
            "block_wire_bytes": info.fingerprint.wire_bytes,
            "requests": len(self.assigned),
            "cached_blocks": len(self.cached.keys),
            "load": self.load.model_dump(),
        }


class Registry:
    """Workers by their link identity."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout  # seconds without a word until a worker is lost
        self._lateness = Lateness(timeout)
        self._workers: dict[bytes, Worker] = {}
        self._num_given = 0  # attempts

    def all(self) -> list[Worker]:
        """Every known worker, in order of registration."""
        return list(self._workers.values())

    def get(self, peer: bytes) -> Worker | None:
        """The worker behind a link identity."""
        return self._workers.get(peer)

    def named(self, worker_id: str) -> Worker | None:
        """The worker registered under an id."""
        return next((w for w in self._workers.values() if w.worker_id == worker_id), None)

    def serving(self, role: Role) -> list[Worker]:
        """Workers of a role that take new requests."""
        return [
            worker
            for worker in self._workers.values()
            if worker.info.role == role and worker.state is WorkerState.SERVING
        ]

    def register(self, peer: bytes, info: Register, now: float) -> list[Worker]:
        """Take a worker in. Returns what it replaces: its former epochs and sessions.

        A repeated registration of the same epoch and session keeps what the worker holds.
        """
        known = self._workers.get(peer)
        if known is not None and _incarnation(known.info) == _incarnation(info):
            known.info, known.last_seen = info, now
            known.report(info.load)
            return []
        workers = self._workers.values()
        replaced = [w for w in workers if w.worker_id == info.worker_id or w.peer == peer]
        for worker in replaced:
            self._forget(worker)
        self._workers[peer] = Worker(peer, info, now)
        return replaced

    def heartbeat(self, peer: bytes, message: Heartbeat, now: float) -> bool:
        """Note a sign of life; False if the sender is not registered."""
        worker = self._workers.get(peer)
        if worker is None or worker.info.epoch != message.epoch:
            return False
        worker.report(message.load, message.num_received)
        worker.last_seen = now
        return True

    def give(self, worker: Worker, attempt_id: str, assignment: Assignment) -> None:
        """A worker is given an attempt: it counts from now on, before any report."""
        self._num_given += 1
        worker.turn = self._num_given
        worker.give(attempt_id, assignment)

    def leave(self, peer: bytes, next_role: Role | None = None) -> None:
        """The worker takes no new requests, in its present role or at all."""
        worker = self._workers.get(peer)
        if worker is not None:
            worker.advance(WorkerEvent.CHANGES if next_role else WorkerEvent.LEAVES, next_role)

    def end_role(self, peer: bytes, next_role: Role) -> Worker | None:
        """The worker has given up what it had, and comes back; None if it is not known."""
        worker = self._workers.get(peer)
        if worker is not None:
            worker.advance(WorkerEvent.ENDS_ROLE, next_role)
        return worker

    def remove(self, peer: bytes) -> Worker | None:
        """Forget a worker; None if it was not known."""
        worker = self._workers.get(peer)
        if worker is not None:
            self._forget(worker)
        return worker

    def expire(self, now: float) -> list[Worker]:
        """Remove and return the workers that have been silent for too long.

        To be called often, as ``Lateness`` asks. By as much as a call comes late,
        every worker is given longer: what it has said may be waiting to be read.
        """
        late = self._lateness.look(now)
        for worker in self._workers.values():
            worker.last_seen = min(now, worker.last_seen + late)
        lost = [w for w in self._workers.values() if now - w.last_seen > self._timeout]
        for worker in lost:
            self._forget(worker)
        return lost

    def _forget(self, worker: Worker) -> None:
        worker.advance(WorkerEvent.GOES, worker.next_role)
        del self._workers[worker.peer]


def _incarnation(info: Register) -> tuple[int, int]:
    return info.epoch, info.session
