"""A worker's standing with the router: every event in every state, and any order beside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import RoleChangeRefusedError, WorkerNotFoundError
from protocol.link import Server
from protocol.messages import Heartbeat, Leaving, Left, RegisterAgain, Role
from router.membership import Membership
from router.pools import OTHER
from router.registry import Worker
from router.worker_states import TRANSITIONS, WorkerEvent, WorkerState
from tests.router_scene import LOAD, Wire, registration

SERVING, DRAINING, FLIPPING, LEAVING, GONE = WorkerState
REJECTED = None

# What follows on each state, in the order of WorkerState.
NEXT: dict[WorkerEvent, tuple[WorkerState | None, ...]] = {
    WorkerEvent.ASKED_TO_CHANGE: (DRAINING, DRAINING, REJECTED, REJECTED, REJECTED),
    WorkerEvent.UNANSWERED: (SERVING, SERVING, REJECTED, REJECTED, REJECTED),
    WorkerEvent.CHANGES: (DRAINING, DRAINING, DRAINING, DRAINING, REJECTED),
    WorkerEvent.ENDS_ROLE: (FLIPPING, FLIPPING, FLIPPING, FLIPPING, REJECTED),
    WorkerEvent.LEAVES: (LEAVING, LEAVING, LEAVING, LEAVING, REJECTED),
    WorkerEvent.GOES: (GONE, GONE, GONE, GONE, REJECTED),
}


@pytest.mark.parametrize("state", WorkerState)
@pytest.mark.parametrize("event", WorkerEvent)
def test_every_event_in_every_state_is_in_the_table_or_rejected(
    event: WorkerEvent, state: WorkerState
) -> None:
    worker = Worker(b"p0", registration("p0"), 0.0, state=state)
    follows = NEXT[event][[*WorkerState].index(state)]
    assert TRANSITIONS[state].get(event) is follows
    if follows is REJECTED:
        with pytest.raises(ValueError, match=f"{event.name} while {state.name}"):
            worker.advance(event)
        assert worker.state is state
    else:
        worker.advance(event, "decode")
        assert (worker.state, worker.next_role) == (follows, "decode")


@dataclass
class Standing:
    """What the router must think of a worker."""

    role: Role
    epoch: int = 0  # of its last registration
    session: int = 0
    state: WorkerState = GONE
    next_role: Role | None = None


EVENTS = (
    "register",
    "drop the router's work",
    "restart",
    "beat",
    "beat, a message was lost",
    "leave",
    "leave the role",
    "be gone",
    "end the role",
    "lose its connection",
    "be drained",
    "be asked to change",
)


class Model:
    """A router's membership, and beside it what it must be."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.lost: list[tuple[str, bool]] = []
        self.members = Membership(
            cast("Server", self.wire),
            "router",
            lambda worker, left: self.lost.append((worker.worker_id, left)),
            lambda: 0.0,
        )
        roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
        self.standings = {name: Standing(role) for name, role in roles.items()}
        self.expected: list[tuple[str, bool]] = []  # in ``lost``

    def advance(self, name: str, event: str) -> None:
        """Let it happen to a worker, and compare with what must follow."""
        standing = self.standings[name]
        if event in ("register", "drop the router's work", "restart"):
            self._register(name, standing, event)
        elif event.startswith("beat"):
            self._beat(name, standing, late=event != "beat")
        elif event in ("be drained", "be asked to change", "lose its connection"):
            self._by_router(name, standing, event)
        else:
            self._says(name, standing, event)
        rows = {row["id"]: row for row in (w.row() for w in self.members.registry.all())}
        present = {n: s for n, s in self.standings.items() if s.state is not GONE}
        assert {n: (r["role"], r["state"], r["next_role"]) for n, r in rows.items()} == {
            n: (s.role, s.state.value, s.next_role) for n, s in present.items()
        }
        assert self.lost == self.expected

    def _register(self, name: str, standing: Standing, event: str) -> None:
        known = standing.state is not GONE
        standing.session += event == "drop the router's work" or not known
        standing.epoch += event == "restart"
        if event != "register" or not known:  # else it is a repetition
            if known:
                self.expected.append((name, standing.next_role is not None))
            standing.role = standing.next_role or standing.role
            standing.state, standing.next_role = SERVING, None
        info = registration(name, standing.epoch, standing.session)
        self._hear(name, info.model_copy(update={"role": standing.role}))

    def _beat(self, name: str, standing: Standing, *, late: bool) -> None:
        before = len(self.wire.to(name, RegisterAgain))
        beat = Heartbeat(epoch=standing.epoch, load=LOAD, num_sent=int(late), num_received=0)
        known = standing.state is not GONE
        if known and late:
            self._end(name, standing, left=False)
        self._hear(name, beat)
        again = len(self.wire.to(name, RegisterAgain)) - before
        assert again == (standing.state is GONE)

    def _says(self, name: str, standing: Standing, event: str) -> None:
        other = OTHER[standing.role]
        if event.startswith("leave"):
            next_role = other if event == "leave the role" else None
            self._hear(name, Leaving(next_role=next_role))
            if standing.state is not GONE:
                standing.state = DRAINING if next_role else LEAVING
                standing.next_role = next_role
        elif event == "end the role":
            self._hear(name, Left(next_role=other))
            if standing.state is not GONE:
                standing.state, standing.next_role = FLIPPING, other
                self.expected.append((name, True))
        else:
            self._hear(name, Left())
            if standing.state is not GONE:
                self._end(name, standing, left=True)

    def _by_router(self, name: str, standing: Standing, event: str) -> None:
        worker = self.members.registry.named(name)
        if event == "lose its connection":
            if worker is not None:
                self.members.lose(worker, "its connection is gone")
                self.members.lose(worker, "twice")
                self._end(name, standing, left=False)
        elif standing.state is GONE:
            with pytest.raises(WorkerNotFoundError):
                self._ask(name, standing, event)
        elif event == "be drained":
            self._ask(name, standing, event)
            standing.state, standing.next_role = LEAVING, None
        else:
            try:
                self._ask(name, standing, event)
            except RoleChangeRefusedError:
                return
            assert standing.state is SERVING
            standing.state = DRAINING

    def _ask(self, name: str, standing: Standing, event: str) -> None:
        if event == "be drained":
            self.members.drain(name)
        else:
            self.members.pools.flip(name, OTHER[standing.role])

    def _end(self, name: str, standing: Standing, *, left: bool) -> None:
        standing.state, standing.next_role = GONE, None
        self.expected.append((name, left))

    def _hear(self, name: str, message: object) -> None:
        self.members.handle(name.encode(), message)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["p0", "p1", "d0", "d1"]), st.sampled_from(EVENTS)), max_size=40
    )
)
def test_workers_stand_as_the_model_says_in_any_order_of_events(
    events: list[tuple[str, str]],
) -> None:
    model = Model()
    for name in model.standings:
        model.advance(name, "register")
    for name, event in events:
        model.advance(name, event)
