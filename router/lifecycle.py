"""A request's life in the router: a pure state machine over its attempts.

    WAITING ──Placed──> PREFILLING ──first token──> DECODING ──last token──> ENDED
       ^                    │                          │
       └── worker lost or left, retryable failure ─────┘   while retries are left
    any state ──final failure, client gone, deadline, router ends──> ENDED
    WAITING ──no workers, shed──> ENDED

An event goes in, actions come out; nothing is sent or awaited here. ``TRANSITIONS`` names what
every event does in every state.

An attempt is a prefill and a decode worker at work on the request, or a decode worker alone,
under an id of its own: messages of a former attempt are none of the present one's. It begins with
the tokens delivered so far, so that it goes on with the next. Its tokens come from two workers
over two connections, so they may arrive out of order or twice: they are delivered by index, each
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from protocol.errors import (
    DeadlineError,
    KvferryError,
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from protocol.messages import FinishReason, FirstToken, TokenUpdate
from protocol.sampling import TokenLogprobs
from router.generation import TokenChunk
from router.lifecycle_events import (
    Action,
    AttemptFailed,
    CancelOn,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Event,
    Fail,
    NoWorkers,
    Placed,
    Retry,
    RouterEnds,
    Shed,
    WorkerLeft,
    WorkerLost,
)


class RequestState(Enum):
    """Where a request stands; the module's docstring draws the transitions."""

    WAITING = auto()  # for its turn on workers
    PREFILLING = auto()
    DECODING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class RequestLifecycle:
    """One request, on its way through one or more attempts."""

    request_id: str
    max_retries: int = 0
    state: RequestState = RequestState.WAITING
    token_ids: list[int] = field(default_factory=list)  # delivered
    prefill_id: str | None = None  # None: decode computes the prompt itself
    decode_id: str = ""
    avoid: set[str] = field(default_factory=set)  # workers on which an attempt failed
    _num_attempts: int = 0
    _num_retries: int = 0  # after failures
    _failure: KvferryError | None = None  # of the last attempt
    _decode_has_it: bool = False  # decode sent a token, so prefill is not needed any more
    _early: dict[int, TokenUpdate] = field(default_factory=dict)  # by index, not deliverable yet

    @property
    def attempt_id(self) -> str:
        """What the workers call the present attempt."""
        return f"{self.request_id}#{self._num_attempts}"

    def handle(self, event: Event) -> list[Action]:
        """Advance by one event. A message must be of the present attempt.

        Raises ValueError for an event that cannot be in this state.
        """
        transition = TRANSITIONS[self.state].get(type(event))
        if transition is None:
            raise ValueError(f"{type(event).__name__} while {self.state.name}")
        return transition(self, event)

    # Transitions -----------------------------------------------------------------------------

    def _start(self, event: Placed) -> list[Action]:
        self.state = RequestState.PREFILLING
        self.prefill_id, self.decode_id = event.prefill_id, event.decode_id
        self._num_attempts += 1
        return []

    def _first_token(self, event: FirstToken) -> list[Action]:
        self.state = RequestState.DECODING
        update = TokenUpdate(
            request_id=event.request_id,
            index=event.index,
            token_ids=[event.token_id],
            finish_reason=event.finish_reason,
            logprobs=None if event.logprobs is None else [event.logprobs],
        )
        return self._deliver(update, event if not self.token_ids else None)

    def _tokens(self, event: TokenUpdate) -> list[Action]:
        self._decode_has_it = True
        return self._deliver(event)

    def _failed(self, event: AttemptFailed) -> list[Action]:
        if not event.error.retryable:
            return self._fail(event.error)
        if not isinstance(event.error, OverloadedError):
            # A worker that can still complain is not at fault, if it has a partner that is lost.
            partner = self.decode_id if event.worker_id == self.prefill_id else self.prefill_id
            self.avoid.add(partner or event.worker_id)
        return self._try_again(event.error, event.error.code)

    def _lost(self, event: WorkerLost) -> list[Action]:
        role = self._role_needed(event.worker_id)
        if role is None:
            return []
        error = WorkerLostError(f"{role} worker {event.worker_id} was lost")
        return self._try_again(error, f"{role}_lost")

    def _left(self, event: WorkerLeft) -> list[Action]:
        role = self._role_needed(event.worker_id)
        if role is None:
            return []
        error = WorkerLostError(f"{role} worker {event.worker_id} left")
        return self._try_again(error, "worker_left", charge=False)  # each leaves but once

    def _shed(self, event: Shed) -> list[Action]:
        return self._fail(event.error)

    def _no_workers(self, event: NoWorkers) -> list[Action]:
        if self._failure is None:
            return self._fail(UnavailableError(event.reason))
        return self._fail(WorkerLostError(f"{self._failure}, and then {event.reason}"))

    def _time_out(self, _: DeadlinePassed) -> list[Action]:
        return self._fail(DeadlineError("the request took longer than its timeout"))

    def _cut_off(self, _: RouterEnds) -> list[Action]:
        return self._fail(UnavailableError("the router is shutting down"))

    def _leave(self, _: ClientGone) -> list[Action]:
        return self._end()

    def _ignore(self, _: Event) -> list[Action]:
        return []

    # What they share -------------------------------------------------------------------------

    def _deliver(self, update: TokenUpdate, first: FirstToken | None = None) -> list[Action]:
        """What can be delivered now; ``first`` is what comes with the very first token."""
        known = self._early.get(update.index)
        if known is None or len(update.token_ids) > len(known.token_ids):
            self._early[update.index] = update
        ready: list[int] = []
        logprobs: list[TokenLogprobs] = []
        reason: FinishReason | None = None
        for start in sorted(self._early):
            if start > len(self.token_ids) or reason is not None:
                break
            update = self._early.pop(start)
            num_known = len(self.token_ids) - start
            ready += update.token_ids[num_known:]
            logprobs += (update.logprobs or [])[num_known:]
            self.token_ids += update.token_ids[num_known:]
            reason = update.finish_reason
        if reason is not None:
            self.state = RequestState.ENDED
        elif not ready:
            return []
        chunk = TokenChunk(
            ready,
            reason,
            logprobs=logprobs or None,
            prompt_logprobs=first.prompt_logprobs if first else None,
            num_cached_tokens=first.num_cached_tokens if first else None,
        )
        return [Deliver(chunk)]

    def _role_needed(self, worker_id: str) -> str | None:
        """What the attempt still needs a worker for."""
        if worker_id == self.decode_id:
            return "decode"
        has_first_token = self.state is RequestState.DECODING
        if worker_id == self.prefill_id and not (has_first_token and self._decode_has_it):
            return "prefill"
        return None

    def _try_again(self, error: KvferryError, reason: str, *, charge: bool = True) -> list[Action]:
        if charge and self._num_retries == self.max_retries:
            return self._fail(error)
        self._num_retries += charge
        cancels = self._cancels()
        self.state = RequestState.WAITING
        self._failure = error
        self._decode_has_it = False
        self._early.clear()
        return [*cancels, Retry(reason)]

    def _fail(self, error: KvferryError) -> list[Action]:
        return [Fail(error), *self._end()]

    def _end(self) -> list[Action]:
        cancels = self._cancels()
        self.state = RequestState.ENDED
        return cancels

    def _cancels(self) -> list[Action]:
        if self.state is RequestState.WAITING:
            return []
        workers = (self.prefill_id, self.decode_id)
        return [CancelOn(worker, self.attempt_id) for worker in workers if worker is not None]


Transition = Callable[[RequestLifecycle, Any], list[Action]]

_AT_WORK: Mapping[type[Event], Transition] = {
    FirstToken: RequestLifecycle._first_token,
    TokenUpdate: RequestLifecycle._tokens,
    AttemptFailed: RequestLifecycle._failed,
    WorkerLost: RequestLifecycle._lost,
    WorkerLeft: RequestLifecycle._left,
    ClientGone: RequestLifecycle._leave,
    DeadlinePassed: RequestLifecycle._time_out,
    RouterEnds: RequestLifecycle._cut_off,
}

# What is not here cannot happen: there is no attempt to hear of, or one at work already.
TRANSITIONS: Mapping[RequestState, Mapping[type[Event], Transition]] = {
    RequestState.WAITING: {
        Placed: RequestLifecycle._start,
        NoWorkers: RequestLifecycle._no_workers,
        Shed: RequestLifecycle._shed,
        WorkerLost: RequestLifecycle._ignore,
        WorkerLeft: RequestLifecycle._ignore,
        ClientGone: RequestLifecycle._leave,
        DeadlinePassed: RequestLifecycle._time_out,
        RouterEnds: RequestLifecycle._cut_off,
    },
    RequestState.PREFILLING: _AT_WORK,
    RequestState.DECODING: _AT_WORK,
    RequestState.ENDED: dict.fromkeys(_AT_WORK, RequestLifecycle._ignore),
}
