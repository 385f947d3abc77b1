"""A request's life in the router: a pure state machine.

    PREFILLING ──FirstToken──> DECODING ──last token──> ENDED
        └── any failure, worker lost, client gone, deadline ──┘

An event goes in, actions come out; nothing is sent or awaited here. Tokens come from two workers
over two connections, so they may arrive out of order or twice: they are delivered by index, each
once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import assert_never

from protocol.errors import DeadlineError, KvferryError, WorkerLostError, error_from_code
from protocol.messages import FinishReason, FirstToken, RequestFailed, TokenUpdate
from router.generation import TokenChunk


class RequestState(Enum):
    """Where a request stands; the module's docstring draws the transitions."""

    PREFILLING = auto()
    DECODING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died, left or was replaced."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request took longer than it may."""


Event = FirstToken | TokenUpdate | RequestFailed | WorkerLost | ClientGone | DeadlinePassed


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the client new tokens."""

    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class Fail:
    """Give the client an error."""

    error: KvferryError


@dataclass(frozen=True, slots=True)
class CancelOn:
    """Tell a worker to drop the request."""

    worker_id: str


Action = Deliver | Fail | CancelOn


@dataclass(slots=True, eq=False)
class RequestLifecycle:
    """One request on its two workers."""

    request_id: str
    prefill_id: str
    decode_id: str
    state: RequestState = RequestState.PREFILLING
    num_delivered: int = 0  # tokens
    decode_has_it: bool = False  # decode sent a token, so prefill is not needed any more
    _early: dict[int, TokenUpdate] = field(default_factory=dict)  # by index, not deliverable yet

    def handle(self, event: Event) -> list[Action]:
        """Advance by one event. After the end every event is ignored."""
        if self.state is RequestState.ENDED:
            return []
        match event:
            case FirstToken():
                self.state = RequestState.DECODING
                return self._deliver(0, [event.token_id], event.finish_reason)
            case TokenUpdate():
                self.decode_has_it = True
                return self._deliver(event.index, event.token_ids, event.finish_reason)
            case RequestFailed():
                return self._fail(error_from_code(event.code, event.message))
            case WorkerLost():
                return self._worker_lost(event.worker_id)
            case ClientGone():
                return self._end()
            case DeadlinePassed():
                return self._fail(DeadlineError("the request took longer than --request-timeout"))
            case _:
                assert_never(event)

    def _deliver(
        self, index: int, token_ids: list[int], reason: FinishReason | None
    ) -> list[Action]:
        update = TokenUpdate(
            request_id=self.request_id, index=index, token_ids=token_ids, finish_reason=reason
        )
        known = self._early.get(index)
        if known is None or len(token_ids) > len(known.token_ids):
            self._early[index] = update
        ready: list[int] = []
        for start in sorted(self._early):
            if start > self.num_delivered:
                break
            update = self._early.pop(start)
            fresh = update.token_ids[self.num_delivered - start :]
            ready += fresh
            self.num_delivered += len(fresh)
            if update.finish_reason is not None:
                self.state = RequestState.ENDED
                return [Deliver(TokenChunk(ready, update.finish_reason))]
        return [Deliver(TokenChunk(ready))] if ready else []

    def _worker_lost(self, worker_id: str) -> list[Action]:
        first_token_missing = self.state is RequestState.PREFILLING
        if worker_id == self.prefill_id and (first_token_missing or not self.decode_has_it):
            return self._fail(WorkerLostError(f"prefill worker {worker_id} was lost"))
        if worker_id == self.decode_id:
            return self._fail(WorkerLostError(f"decode worker {worker_id} was lost"))
        return []

    def _fail(self, error: KvferryError) -> list[Action]:
        return [Fail(error), *self._end()]

    def _end(self) -> list[Action]:
        self.state = RequestState.ENDED
        return [CancelOn(self.prefill_id), CancelOn(self.decode_id)]
