"""What the workers were given: at most one attempt a request, on one or two workers.

Keeps the workers' assignments true, by which ``router.capacity`` knows their room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol.messages import Cancel, GenerateRequest, Message, PeerAddress, PrefillRequest
from router.admission import Start
from router.capacity import uncached_tokens
from router.lifecycle import RequestState
from router.membership import Membership
from router.registry import Assignment, Worker
from router.running import Running


class Attempts:
    """The attempts at work, by the id that their workers know. ``clock`` is monotonic."""

    def __init__(self, members: Membership, clock: Callable[[], float]) -> None:
        self._members = members
        self._clock = clock
        self._by_id: dict[str, Running] = {}

    def find(self, attempt_id: str) -> Running | None:
        """The request of an attempt, unless the attempt is over."""
        return self._by_id.get(attempt_id)

    def begin(self, start: Start) -> None:
        """Give a request, which has entered the attempt, to its workers.

        The prompt and what was generated so far go to prefill, or to decode alone.
        """
        running, pair = start.running, start.pair
        attempt_id, num_tokens = running.lifecycle.attempt_id, running.num_tokens
        running.pair = pair
        self._by_id[attempt_id] = running
        computes = pair.prefill or pair.decode
        expected, give = start.demand.expected_tokens, self._members.registry.give
        prompt = Assignment(
            num_tokens,
            expected,
            begun=True,
            prompt_tokens=uncached_tokens(computes, start.demand),
            prefix=running.prompt(computes.info.fingerprint),
            number=computes.num_sent + 1,
        )
        give(computes, attempt_id, prompt)
        if pair.prefill:
            give(pair.decode, attempt_id, Assignment(num_tokens, expected, begun=False))
        message = self._message(running, pair.decode if pair.prefill else None)
        if not self._members.send(computes, message):
            self._members.lose(computes, "it cannot be reached")

    def note(self, running: Running, attempt_id: str) -> None:
        """An event of the attempt has been handled: its workers may have less to do."""
        pair, state = running.pair, running.lifecycle.state
        if pair is None:
            return
        if pair.prefill is not None and state is not RequestState.PREFILLING:
            pair.prefill.end(attempt_id)
        if state in (RequestState.WAITING, RequestState.ENDED):
            pair.decode.end(attempt_id)
            self._by_id.pop(attempt_id, None)
        if state is RequestState.DECODING:
            pair.decode.goes_on(attempt_id, running.num_tokens)

    def cancel(self, running: Running, worker_id: str, attempt_id: str) -> None:
        """Tell one of the attempt's workers to drop it, if it is still known."""
        assert running.pair is not None
        for worker in running.pair.workers:
            known = self._members.registry.get(worker.peer) is worker
            if worker.worker_id == worker_id and known:
                self._members.send(worker, Cancel(request_id=attempt_id))

    def _message(self, running: Running, decode: Worker | None) -> Message:
        """What the worker that computes the prompt is asked; ``decode`` continues it."""
        request, lifecycle = running.request, running.lifecycle
        continuation: dict[str, Any] = {
            "request_id": lifecycle.attempt_id,
            "token_ids": [*request.prompt_token_ids, *lifecycle.token_ids],
            "num_prompt_tokens": len(request.prompt_token_ids),
            "sampling": request.sampling,
            "cache_salt": request.cache_salt,
            "priority": request.priority,
            "timeout": max(0.0, running.deadline - self._clock()),
        }
        if decode is None:
            return GenerateRequest(**continuation)
        info = decode.info
        peer = PeerAddress(
            worker_id=info.worker_id, epoch=info.epoch, control=info.control, data=info.data
        )
        return PrefillRequest(**continuation, decode=peer)
