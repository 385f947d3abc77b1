"""Workers that compute nothing: they register, answer prompts at once, and give tokens in time.

For what the router itself costs. They speak the real protocol over the real link; the prefill
dummy tells the decode dummies of a request by a call, where real workers hand off.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from cli.router_link import RouterLink
from engine.block_pool import BlockPool
from engine.cache_feed import CacheFeed
from protocol.geometry import Fingerprint, KVGeometry
from protocol.messages import (
    Cancel,
    ChangeRole,
    FirstToken,
    Message,
    PrefillRequest,
    Register,
    Role,
    Tokens,
    TokenUpdate,
    WorkerLoad,
)

NUM_BLOCKS = 1 << 20
GEOMETRY = KVGeometry(num_kv_heads=1, num_layers=1, block_size=16, head_dim=4, dtype="float32")
FINGERPRINT = Fingerprint(weights_digest="00", rope="none", geometry=GEOMETRY)

Stamp = Callable[[list[int], int], None]  # told the prompt and index of each token that is sent


@dataclass(slots=True)
class _Sequence:
    prompt: list[int]
    index: int  # of the next token
    max_tokens: int


class _Dummy:
    """What the two roles share: a link to the router, whose every word it ignores."""

    def __init__(self, role: Role, worker_id: str, endpoint: str, max_num_seqs: int) -> None:
        self._role: Role = role
        self._id = worker_id
        self._load = WorkerLoad(
            max_num_seqs=max_num_seqs,
            free_blocks=NUM_BLOCKS,
            total_blocks=NUM_BLOCKS,
            prefill_tokens_per_second=1e6,
        )
        feed = CacheFeed(BlockPool(1, GEOMETRY.block_size, b""))
        self.link = RouterLink(endpoint, worker_id, None, self._register, self, lambda: None, feed)

    def from_router(self, router_id: str, message: Message) -> None:
        """See cli.router_link.WorkerRole."""

    def drop_router(self, router_id: str) -> None:
        """See cli.router_link.WorkerRole."""

    def change(self, asked: ChangeRole) -> None:
        """See cli.router_link.WorkerRole."""

    def _register(self, session: int) -> Register:
        return Register(
            worker_id=self._id,
            epoch=os.getpid(),
            session=session,
            role=self._role,
            model="dummy",
            fingerprint=FINGERPRINT,
            vocab_size=1 << 20,
            max_model_len=1 << 20,
            pid=os.getpid(),
            host="localhost",
            control="",
            data=b"",
            transport="none",
            metrics="",
            load=self._load,
        )


class DummyDecode(_Dummy):
    """Gives every sequence of its batch one token each ``interval`` seconds."""

    def __init__(
        self, worker_id: str, endpoint: str, max_num_seqs: int, interval: float, stamp: Stamp
    ) -> None:
        super().__init__("decode", worker_id, endpoint, max_num_seqs)
        self._interval = interval
        self._stamp = stamp
        self._running: dict[str, _Sequence] = {}

    def begin(self, request: PrefillRequest) -> None:
        """Take a request whose first token is sent."""
        max_tokens = request.sampling.max_tokens
        self._running[request.request_id] = _Sequence(request.token_ids, 1, max_tokens)

    def from_router(self, router_id: str, message: Message) -> None:
        """See cli.router_link.WorkerRole."""
        if isinstance(message, Cancel):
            self._running.pop(message.request_id, None)

    async def steps(self, delay: float) -> None:
        """Serve until cancelled, ``delay`` seconds out of step with the others."""
        await asyncio.sleep(delay)
        due = time.perf_counter()
        while True:
            due += self._interval
            await asyncio.sleep(due - time.perf_counter())
            if self._running:
                self._step()

    def _step(self) -> None:
        updates = []
        for request_id, sequence in list(self._running.items()):
            last = sequence.index + 1 == sequence.max_tokens
            update = TokenUpdate(
                request_id=request_id,
                index=sequence.index,
                token_ids=[token_of(sequence.prompt)],
                finish_reason="length" if last else None,
            )
            updates.append(update)
            if last:
                del self._running[request_id]
            self._stamp(sequence.prompt, sequence.index)
            sequence.index += 1
        self.link.send(Tokens(updates=updates))


class DummyPrefill(_Dummy):
    """Answers each prompt at once, and passes it on to its decode worker."""

    def __init__(self, endpoint: str, decodes: dict[str, DummyDecode], stamp: Stamp) -> None:
        super().__init__("prefill", "prefill-0", endpoint, 1 << 16)
        self._decodes = decodes
        self._stamp = stamp

    def from_router(self, router_id: str, message: Message) -> None:
        """See cli.router_link.WorkerRole."""
        if isinstance(message, PrefillRequest):
            first = FirstToken(
                request_id=message.request_id,
                index=0,
                token_id=token_of(message.token_ids),
                finish_reason=None,
                num_cached_tokens=0,
            )
            self._stamp(message.token_ids, 0)
            self.link.send(first)
            self._decodes[message.decode.worker_id].begin(message)


def token_of(prompt: list[int]) -> int:
    """The token that answers a prompt: its last."""
    return prompt[-1]


class DummyPools:
    """One prefill dummy and as many decode dummies as ``num_streams`` of ``batch`` need."""

    def __init__(
        self, endpoint: str, num_streams: int, batch: int, interval: float, stamp: Stamp
    ) -> None:
        names = [f"decode-{number}" for number in range(-(-num_streams // batch))]
        self._decodes = {
            name: DummyDecode(name, endpoint, batch + batch // 4, interval, stamp) for name in names
        }
        self._prefill = DummyPrefill(endpoint, self._decodes, stamp)
        self._interval = interval
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> DummyPools:
        runs = [dummy.link.run() for dummy in (self._prefill, *self._decodes.values())]
        for number, decode in enumerate(self._decodes.values()):
            runs.append(decode.steps(self._interval * number / len(self._decodes)))
        self._tasks = [asyncio.create_task(run) for run in runs]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
