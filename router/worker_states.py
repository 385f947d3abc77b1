"""Where a worker stands with the router, and what follows on what happens to it.

    SERVING ──CHANGES──> DRAINING ──ENDS_ROLE──> FLIPPING ──GOES (it registers in its new role)
    SERVING ──ASKED_TO_CHANGE──> DRAINING ──UNANSWERED──> SERVING
    any state ──LEAVES──> LEAVING
    any state ──GOES──> GONE

A worker that registers is SERVING; with another epoch or session it is another worker, and the
former one GOES. What the worker itself says holds in every state: it may have been said before
what the router did was heard. Heartbeats change no state, and peers that are no workers have none:
their heartbeats are answered with RegisterAgain, and what else they say of themselves is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto


class WorkerState(Enum):
    """What a worker may be asked for."""

    SERVING = "serving"
    DRAINING = "draining"  # it ends its work, to come back in another role
    FLIPPING = "flipping"  # it takes the other role
    LEAVING = "leaving"
    GONE = "gone"  # no longer registered


class WorkerEvent(Enum):
    """What happens to a worker."""

    ASKED_TO_CHANGE = auto()  # the router has sent it ChangeRole
    UNANSWERED = auto()  # and it has not said that it changes
    CHANGES = auto()  # it says Leaving, with its next role
    ENDS_ROLE = auto()  # it says Left, with its next role
    LEAVES = auto()  # it says Leaving, or was asked to
    GOES = auto()  # it says Left, is lost, or has registered anew


_BY_ITSELF: Mapping[WorkerEvent, WorkerState] = {
    WorkerEvent.CHANGES: WorkerState.DRAINING,
    WorkerEvent.ENDS_ROLE: WorkerState.FLIPPING,
    WorkerEvent.LEAVES: WorkerState.LEAVING,
    WorkerEvent.GOES: WorkerState.GONE,
}
_MAY_BE_ASKED: Mapping[WorkerEvent, WorkerState] = {
    **_BY_ITSELF,
    WorkerEvent.ASKED_TO_CHANGE: WorkerState.DRAINING,
    WorkerEvent.UNANSWERED: WorkerState.SERVING,
}

# What is not here cannot happen: only a worker that serves is asked, or asked again.
TRANSITIONS: Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]] = {
    WorkerState.SERVING: _MAY_BE_ASKED,
    WorkerState.DRAINING: _MAY_BE_ASKED,
    WorkerState.FLIPPING: _BY_ITSELF,
    WorkerState.LEAVING: _BY_ITSELF,
    WorkerState.GONE: {},
}
