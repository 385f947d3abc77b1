"""The clients and the router of a simulation, around the router's real request lifecycle.

An attempt that fails is followed by another on the same two workers.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.errors import error_from_code
from protocol.messages import FirstToken, RequestFailed, TokenUpdate
from protocol.sampling import SamplingParams
from router.lifecycle import RequestLifecycle, RequestState
from router.lifecycle_events import (
    AttemptFailed,
    CancelOn,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Placed,
    Retry,
    WorkerLost,
)
from tests.handoff_simulation.network import Network
from tests.handoff_simulation.setup import DECODE, EPOCH, PREFILL, Request


class SimulatedRouter:
    """``start(attempt_id, request, token_ids)``, ``start_alone`` with the same arguments, and
    ``cancel_on(worker_id, attempt_id)`` are what its messages do when they arrive.

    Decode serves ``alone`` of the attempts without prefill.
    """

    def __init__(
        self,
        network: Network,
        start: Callable[[str, Request, list[int]], None],
        start_alone: Callable[[str, Request, list[int]], None],
        cancel_on: Callable[[str, str], None],
        alone: float,
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._attempts: dict[str, Request] = {}  # every one there ever was
        self._network = network
        self._start = start
        self._start_alone = start_alone
        self._cancel_on = cancel_on
        self._alone = alone

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        timeout: float = 1e9,
        epoch: int = EPOCH,
        max_retries: int = 0,
    ) -> Request:
        """A client sends a request."""
        request_id = f"r{len(self.requests)}"
        lifecycle = RequestLifecycle(request_id, max_retries)
        request = Request(prompt, sampling, lifecycle, self._network.now + timeout, epoch)
        self.requests[request_id] = request
        self._place(request)
        return request

    def cancel(self, request: Request) -> None:
        """The client goes away."""
        request.cancelled |= request.lifecycle.state is not RequestState.ENDED
        self._handle(request, ClientGone())

    def give_up(self, worker_id: str) -> None:
        """Take a worker for lost; the worker hears nothing but the cancels."""
        for request in self.requests.values():
            self._handle(request, WorkerLost(worker_id))

    def hear(self, worker_id: str, event: FirstToken | TokenUpdate | RequestFailed) -> None:
        """A worker's message arrives."""
        request = self._attempts[event.request_id]
        at_work = request.lifecycle.state in (RequestState.PREFILLING, RequestState.DECODING)
        stale = not at_work or event.request_id != request.lifecycle.attempt_id
        if isinstance(event, RequestFailed):
            error = error_from_code(event.code, event.message)
            if not stale:
                self._handle(request, AttemptFailed(worker_id, error))
        elif stale:
            self._post_cancel(worker_id, event.request_id)
        else:
            self._handle(request, event)

    def unfinished(self) -> list[str]:
        """Requests whose client still waits."""
        items = self.requests.items()
        return [i for i, r in items if r.lifecycle.state is not RequestState.ENDED]

    def _place(self, request: Request) -> None:
        lifecycle = request.lifecycle
        if lifecycle.state is not RequestState.WAITING:
            return
        alone = self._network.random.random() < self._alone
        lifecycle.handle(Placed(None if alone else PREFILL, DECODE))
        request.num_attempts += 1
        attempt_id = lifecycle.attempt_id
        self._attempts[attempt_id] = request
        token_ids = [*request.prompt, *lifecycle.token_ids]
        side, start = ("decode", self._start_alone) if alone else ("prefill", self._start)
        self._network.post(f"router>{side}", lambda: start(attempt_id, request, token_ids))

    def _handle(self, request: Request, event: Event) -> None:
        for action in request.lifecycle.handle(event):
            match action:
                case Deliver(chunk):
                    request.tokens += chunk.token_ids
                    assert request.finish_reason is None
                    request.finish_reason = chunk.finish_reason
                case Fail(error):
                    request.errors.append(error)
                case CancelOn(worker_id, attempt_id):
                    self._post_cancel(worker_id, attempt_id)
                case Retry():
                    self._network.post("router", lambda: self._place(request))

    def _post_cancel(self, worker_id: str, attempt_id: str) -> None:
        side = "prefill" if worker_id == PREFILL else "decode"
        self._network.post(f"router>{side}", lambda: self._cancel_on(worker_id, attempt_id))
