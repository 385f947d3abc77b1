"""The real dispatcher before simulated workers, on a clock of its own: what overload does to it.

A prefill worker computes prompts one after the other at a fixed rate, a decode worker gives each
running sequence a token every ``TOKEN_TIME``. Both report their load as real workers do.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from protocol.errors import KvferryError, OverloadedError
from protocol.messages import (
    Cancel,
    FirstToken,
    PrefillRequest,
    Tokens,
    TokenUpdate,
    WorkerLoad,
)
from protocol.sampling import SamplingParams
from router.generation import GenerationRequest
from router.running import Running
from tests.router_scene import Scene

STEP = 0.005  # seconds
HEARTBEATS, TICKS = 50, 20  # steps between two of them
PREFILL_RATE = 4000.0  # tokens a second
PROMPT, OUTPUT = 80, 20  # tokens
TOKEN_TIME = 0.025  # seconds
SLOTS, BLOCKS, BLOCK_SIZE = 8, 512, 4
CAPACITY = SLOTS / (OUTPUT * TOKEN_TIME)  # requests a second; prefill could do three times as many


@dataclass(slots=True, eq=False)
class Asked:
    """A client's request and what became of it. Times in seconds."""

    client: str
    arrived: float
    running: Running | None = None  # None: turned away at once
    first_token: float | None = None
    ended: float | None = None
    error: KvferryError | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """An attempt on the workers."""

    attempt_id: str
    num_tokens: int
    index: int  # of its next token in the output
    remaining: int
    next_at: float = 0.0


@dataclass(slots=True)
class Simulation:
    """One prefill and one decode worker, and a router with the given bounds."""

    max_queue_time: float = 1.0
    max_num_requests: int = 64
    now: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    scene: Scene = field(init=False)
    queue: deque[Sequence] = field(default_factory=deque)  # prefill's
    budget: float = 0.0  # tokens that prefill may still compute in this step
    decoding: list[Sequence] = field(default_factory=list)
    most_decoding: int = 0
    _steps: int = 0
    _read: int = 0  # messages of the router

    def __post_init__(self) -> None:
        self.scene = Scene(
            "p0",
            "d0",
            load=self._load("d0"),
            clock=lambda: self.now,
            max_queue_time=self.max_queue_time,
            max_num_requests=self.max_num_requests,
        )

    def offer(self, rate: float, seconds: float, seed: int, client: str = "") -> list[Asked]:
        """Poisson arrivals, open loop: nobody waits for answers. Then ``run`` plays them."""
        rng, moment, news = random.Random(seed), self.now, []
        while (moment := moment + rng.expovariate(rate)) < self.now + seconds:
            news.append(Asked(client, moment))
        self.asked += news
        return news

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        coming = deque(sorted((a for a in self.asked if a.arrived >= self.now), key=_arrival))
        while self.now < end:
            self.now += STEP
            self._steps += 1
            while coming and coming[0].arrived <= self.now:
                self._arrive(coming.popleft())
            self._read_messages()
            self._prefill()
            self._decode()
            if self._steps % HEARTBEATS == 0:
                for worker in ("p0", "d0"):
                    self.scene.beat(worker, self._load(worker))
            if self._steps % TICKS == 0:
                self.scene.dispatcher._check_times()
            self._collect()

    def _arrive(self, asked: Asked) -> None:
        name = f"r{len(self.scene.num_said)}-{asked.arrived}"
        request = GenerationRequest(
            name, [1] * PROMPT, SamplingParams(max_tokens=OUTPUT), client=asked.client
        )
        try:
            asked.running = self.scene.dispatch(request)
        except OverloadedError as error:
            asked.error, asked.ended = error, self.now

    def _read_messages(self) -> None:
        sent = self.scene.wire.sent
        for _, message in sent[self._read :]:
            match message:
                case PrefillRequest():
                    num_output = len(message.token_ids) - message.num_prompt_tokens
                    remaining = message.sampling.max_tokens - num_output
                    num_tokens = len(message.token_ids)
                    self.queue.append(
                        Sequence(message.request_id, num_tokens, num_output, remaining)
                    )
                case Cancel():
                    self.queue = deque(s for s in self.queue if s.attempt_id != message.request_id)
                    self.decoding = [s for s in self.decoding if s.attempt_id != message.request_id]
        self._read = len(sent)

    def _prefill(self) -> None:
        self.budget += STEP * PREFILL_RATE
        while self.queue and self.budget >= self.queue[0].num_tokens:
            sequence = self.queue.popleft()
            self.budget -= sequence.num_tokens
            first = FirstToken(
                request_id=sequence.attempt_id,
                index=sequence.index,
                token_id=1,
                finish_reason=None,
                num_cached_tokens=0,
            )
            self._grow(sequence)
            self.decoding.append(sequence)
            self.scene.say("p0", first)
        if not self.queue:
            self.budget = 0.0

    def _decode(self) -> None:
        updates = []
        self.most_decoding = max(self.most_decoding, len(self.decoding))
        for sequence in self.decoding[:SLOTS]:
            if self.now >= sequence.next_at:
                last = sequence.remaining == 1
                updates.append(
                    TokenUpdate(
                        request_id=sequence.attempt_id,
                        index=sequence.index,
                        token_ids=[1],
                        finish_reason="length" if last else None,
                    )
                )
                self._grow(sequence)
        self.decoding = [s for s in self.decoding if s.remaining]
        if updates:
            self.scene.say("d0", Tokens(updates=updates))

    def _grow(self, sequence: Sequence) -> None:
        sequence.index += 1
        sequence.remaining -= 1
        sequence.num_tokens += 1
        sequence.next_at = self.now + TOKEN_TIME

    def _load(self, worker: str) -> WorkerLoad:
        if worker == "p0":
            return WorkerLoad(
                max_num_seqs=SLOTS,
                num_waiting=len(self.queue),
                waiting_tokens=sum(s.num_tokens for s in self.queue),
                prefill_tokens_per_second=PREFILL_RATE,
            )
        used = sum(-(-s.num_tokens // BLOCK_SIZE) for s in self.decoding)
        return WorkerLoad(
            max_num_seqs=SLOTS,
            num_promised=len(self.decoding),
            num_running=len(self.decoding[:SLOTS]),
            num_waiting=len(self.decoding[SLOTS:]),
            free_blocks=BLOCKS - used,
            total_blocks=BLOCKS,
        )

    def _collect(self) -> None:
        for asked in self.asked:
            if asked.running is None or asked.ended is not None:
                continue
            try:
                while (chunk := asked.running.output.take()) is not None:
                    asked.first_token = asked.first_token or self.now
                    if chunk.finish_reason is not None:
                        asked.ended = self.now
            except KvferryError as error:
                asked.error, asked.ended = error, self.now


def _arrival(asked: Asked) -> float:
    return asked.arrived


def goodput(asked: list[Asked], seconds: float, bound: float) -> float:
    """Requests a second that were answered in full and began to be within ``bound`` seconds."""
    good = [
        a
        for a in asked
        if a.ended and not a.error and a.first_token and a.first_token - a.arrived <= bound
    ]
    return len(good) / seconds
