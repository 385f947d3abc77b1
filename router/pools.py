"""The sizes of the two pools, and their change: workers take the other role, one after the other.

Pure state over the registry, with the clock passed in. A worker changes its role by itself, once
asked; what it says of that, to every router, is in the registry. This router's last change is
remembered, and nothing of it outlives the router: a worker that was asked goes on alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from protocol.errors import InvalidRequestError, RoleChangeRefusedError, WorkerNotFoundError
from protocol.messages import ChangeRole, Role
from router.registry import Registry, Worker
from router.worker_states import WorkerEvent, WorkerState

log = logging.getLogger(__name__)

ANSWER = 5.0  # seconds until a worker that was asked must have begun to drain
OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}


@dataclass(slots=True)
class Flip:
    """One worker on its way into ``role``."""

    worker_id: str
    epoch: int  # of the worker in its former role
    role: Role
    asked: float
    ended: float | None = None
    state: Literal["draining", "flipping", "done", "failed"] = "draining"

    def row(self, now: float) -> dict[str, Any]:
        """The flip as JSON."""
        seconds = round((self.ended or now) - self.asked, 3)
        return {
            "worker": self.worker_id,
            "role": self.role,
            "state": self.state,
            "seconds": seconds,
        }


@dataclass(slots=True)
class Change:
    """What was asked for: so many workers in the end, by workers that take ``role``."""

    sizes: dict[str, int]
    role: Role
    remaining: int  # flips not begun
    flips: list[Flip] = field(default_factory=list)
    reason: str | None = None  # why it ended early

    @property
    def flip(self) -> Flip | None:
        """The one under way."""
        return self.flips[-1] if self.flips and self.flips[-1].ended is None else None

    @property
    def state(self) -> Literal["running", "done", "failed"]:
        """How far it is."""
        if self.reason is not None:
            return "failed"
        return "running" if self.remaining or self.flip else "done"

    def row(self, now: float) -> dict[str, Any]:
        """The change as JSON."""
        flips = [flip.row(now) for flip in self.flips]
        return {**self.sizes, "state": self.state, "reason": self.reason, "flips": flips}


class Pools:
    """Both pools of one router. ``send(worker, message)`` reaches a worker."""

    def __init__(
        self,
        registry: Registry,
        send: Callable[[Worker, ChangeRole], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._send = send
        self._clock = clock
        self._change: Change | None = None

    def present(self) -> dict[str, Any]:
        """The workers that serve in each pool and the last change, for ``GET /admin/pools``."""
        change = self._change.row(self._clock()) if self._change else None
        return {**self._sizes(), "change": change}

    def flip(self, worker_id: str, role: Role) -> None:
        """Let one worker take a role. Raises WorkerNotFoundError, RoleChangeRefusedError."""
        worker = self._registry.named(worker_id)
        if worker is None:
            raise WorkerNotFoundError(f"no worker {worker_id!r} is registered")
        self._check_nothing_under_way()
        self._check(worker, role)
        sizes = self._sizes()
        sizes[role] += 1
        sizes[OTHER[role]] -= 1
        self._change = Change(sizes, role, remaining=0)
        self._ask(self._change, worker)

    def resize(self, prefill: int, decode: int) -> None:
        """Let as many workers as it takes change their role, the least loaded first.

        Raises InvalidRequestError when the sizes do not fit the workers that serve,
        RoleChangeRefusedError.
        """
        if min(prefill, decode) < 1:
            raise InvalidRequestError("no pool may be empty")
        self._check_nothing_under_way()
        sizes = self._sizes()
        serving = sum(sizes.values())
        if prefill + decode != serving:
            message = f"{prefill} prefill and {decode} decode workers are {prefill + decode}"
            raise InvalidRequestError(f"{message}, but {serving} serve")
        more = decode - sizes["decode"]
        role: Role = "decode" if more > 0 else "prefill"
        change = Change({"prefill": prefill, "decode": decode}, role, abs(more))
        self._begin_next(change)
        self._change = change

    def step(self) -> None:
        """Go on with the change under way. To be called often."""
        change = self._change
        if change is None or change.state != "running":
            return
        if change.flip is not None:
            self._follow(change, change.flip)
        if change.state == "running" and change.flip is None:
            try:
                self._begin_next(change)
            except RoleChangeRefusedError as refusal:
                change.reason = str(refusal)
                log.warning("the pools keep their sizes: %s", refusal)

    def _sizes(self) -> dict[str, int]:
        return {role: len(self._registry.serving(role)) for role in OTHER}

    # Checks ----------------------------------------------------------------------------------

    def _check_nothing_under_way(self) -> None:
        """Another router's change shows in its worker's state."""
        for worker in self._registry.all():
            if worker.state in (WorkerState.DRAINING, WorkerState.FLIPPING):
                message = f"a change is under way: worker {worker.worker_id} is"
                raise RoleChangeRefusedError(f"{message} {worker.state.value}")
        if self._change is not None and self._change.state == "running":
            raise RoleChangeRefusedError("a change of the pools is under way")

    def _check(self, worker: Worker, role: Role) -> None:
        """Raise RoleChangeRefusedError when the pools without the worker could not serve."""
        name, former = worker.worker_id, worker.info.role
        if former == role:
            raise RoleChangeRefusedError(f"worker {name} is {role} already")
        if worker.state is not WorkerState.SERVING:
            raise RoleChangeRefusedError(f"worker {name} is {worker.state.value}")
        remaining = [w for w in self._registry.serving(former) if w is not worker]
        if not remaining:
            message = f"worker {name} is the last that serves {former}"
            raise RoleChangeRefusedError(f"{message}: its pool would be empty")
        others = [worker, *self._registry.serving(role)]
        fingerprints = [other.info.fingerprint for other in others]
        if not any(w.info.fingerprint in fingerprints for w in remaining):
            message = f"without worker {name} in {former} no prefill and decode workers"
            raise RoleChangeRefusedError(f"{message} would be left whose KV fits together")

    # Flips -----------------------------------------------------------------------------------

    def _begin_next(self, change: Change) -> None:
        """Ask the least loaded worker, if there is another to ask."""
        if change.remaining == 0:
            return
        workers = self._registry.serving(OTHER[change.role])
        if not workers:
            raise RoleChangeRefusedError(f"no {OTHER[change.role]} worker serves")
        worker = min(workers, key=_load)
        self._check(worker, change.role)
        change.remaining -= 1
        self._ask(change, worker)

    def _ask(self, change: Change, worker: Worker) -> None:
        flip = Flip(worker.worker_id, worker.info.epoch, change.role, self._clock())
        change.flips.append(flip)
        log.info("worker %s is to become %s", flip.worker_id, flip.role)
        self._tell(worker, flip)

    def _tell(self, worker: Worker, flip: Flip) -> None:
        worker.advance(WorkerEvent.ASKED_TO_CHANGE)  # nothing new goes there meanwhile
        self._send(worker, ChangeRole(epoch=flip.epoch, role=flip.role))

    def _follow(self, change: Change, flip: Flip) -> None:
        worker = self._registry.named(flip.worker_id)
        late = self._clock() - flip.asked > ANSWER
        match worker:
            case None:
                self._fail(change, flip, "was lost")
            case Worker() if worker.info.epoch != flip.epoch and worker.info.role == flip.role:
                flip.state, flip.ended = "done", self._clock()
                seconds = flip.ended - flip.asked
                log.info("worker %s is %s after %.1f s", flip.worker_id, flip.role, seconds)
            case Worker() if worker.info.epoch != flip.epoch:
                self._fail(change, flip, f"came back as {worker.info.role}")
            case Worker(state=WorkerState.LEAVING):
                self._fail(change, flip, "is leaving")
            case Worker(state=WorkerState.FLIPPING):
                flip.state = "flipping"
            case Worker(next_role=None) if late:
                worker.advance(WorkerEvent.UNANSWERED)
                self._fail(change, flip, f"did not answer for {ANSWER:g} s")
            case Worker(next_role=None):  # the message may be lost
                self._tell(worker, flip)
            case _:
                pass  # it drains

    def _fail(self, change: Change, flip: Flip, what: str) -> None:
        flip.state, flip.ended = "failed", self._clock()
        change.reason = f"worker {flip.worker_id} {what}"
        log.warning("the pools keep their sizes: %s", change.reason)


def _load(worker: Worker) -> tuple[int, int]:
    """What a worker has to end before it can change: sequences, then prompt tokens."""
    sequences = max(len(worker.assigned), worker.load.num_running + worker.load.num_waiting)
    return sequences, worker.assigned_tokens + worker.foreign_tokens
