"""A whole history: which of the things that can happen does, and what must hold after each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from decode import admission_events as adm
from kvtransfer.inproc import InProcessNetwork
from prefill import handoff_events as hand
from protocol.messages import Revoke
from protocol.sampling import SamplingParams
from tests.handoff_simulation.decode import SimulatedDecode
from tests.handoff_simulation.faulty_transport import Fault
from tests.handoff_simulation.network import Network
from tests.handoff_simulation.prefill import SimulatedPrefill
from tests.handoff_simulation.router import SimulatedRouter
from tests.handoff_simulation.setup import DECODE, EPOCH, PREFILL, Request, Setup

LONG = 10.0  # seconds: longer than any answer takes
LATENESS = 600  # events without an end until that much time passes


class Simulation:
    """``events()`` names what can happen now; each is a callable that makes it happen."""

    def __init__(self, setup: Setup, random: Random) -> None:
        self._random = random
        self.network = Network(random)
        self.channels = self.network.channels
        self.deliver, self.lose = self.network.deliver, self.network.lose
        ends = InProcessNetwork()
        self.prefill = SimulatedPrefill(
            setup,
            self.network,
            ends,
            to_decode=lambda message: self.decode.hear(message),
            to_router=lambda event: self.router.hear(PREFILL, event),
        )
        self.decode = SimulatedDecode(
            setup,
            self.network,
            ends,
            to_prefill=lambda message: self.prefill.hear(message),
            to_router=lambda event: self.router.hear(DECODE, event),
        )
        self.router = SimulatedRouter(
            self.network, self.prefill.start, self.decode.start, self._cancel_on, setup.alone
        )
        self.requests = self.router.requests

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.network.now

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        timeout: float = 1e9,
        epoch: int = EPOCH,
        max_retries: int = 0,
    ) -> Request:
        """A client sends a request."""
        return self.router.submit(prompt, sampling, timeout, epoch, max_retries)

    def events(self) -> list[Callable[[], None]]:
        """Everything that can happen next, faults left out."""
        return [
            *(partial(self.deliver, channel) for channel in self.channels),
            *self.prefill.events(),
            *self.decode.events(),
        ]

    def faults(self) -> list[list[Callable[[], None]]]:
        """Everything that can go wrong next, by kind; blocks are on the way only at times."""
        between_workers = {"prefill>decode", "decode>prefill"} & self.channels.keys()
        blocks = [*self.prefill.plane.faults(), *self.decode.plane.faults()]
        if not self.prefill.plane.transport.quiet:
            blocks += [partial(self.befall, fault) for fault in Fault]
        messages = [partial(self.lose, channel) for channel in sorted(between_workers)]
        return [
            [lambda: self.tick(self._random.uniform(0.0, 8.0))],
            [
                lambda: self.decode.hear(Revoke(request_id="unknown")),
                *messages,
                *self.decode.tier.faults() * 6,
            ],
            *[blocks] * 6,
            [
                *(partial(self.router.cancel, request) for request in self.requests.values()),
                *(partial(self.router.give_up, worker) for worker in (PREFILL, DECODE)),
                *(partial(self._drop_router, worker) for worker in (PREFILL, DECODE)),
            ],
        ]

    def befall(self, fault: Fault) -> None:
        """Something goes wrong with the next message that carries blocks."""
        self.network.lost |= fault.loses
        self.prefill.plane.transport.armed = fault

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass on both workers."""
        self.network.now += seconds
        self.prefill.tick()
        self.decode.tick()

    def step(self, fault_rate: float = 0.0) -> None:
        """Let one event happen and audit both workers."""
        happening = self.events()
        if self._random.random() < fault_rate:
            happening = self._random.choice(self.faults()) or happening
        self._random.choice(happening)()
        self.check()

    def check(self) -> None:
        """Both workers' books are right."""
        self.prefill.check()
        self.decode.check()

    def settle(self, max_events: int = 20_000) -> None:
        """Let things happen, without faults, until nothing is left.

        Time passes only if something was lost: it is noticed when it is overdue.
        """
        for num_events in range(max_events):
            if num_events % 50 == 0:
                self.tick()
            if self.network.lost and num_events % LATENESS == LATENESS - 1:
                self.tick(LONG)
            self.step()
            if self.idle():
                return
        raise AssertionError(f"never idle: {[*self.channels]}, {self.router.unfinished()}")

    def idle(self) -> bool:
        """Whether every request is over and nothing is left of it anywhere."""
        waiting = self.router.unfinished() or self.channels
        return not waiting and self.prefill.idle() and self.decode.idle()

    def _cancel_on(self, worker_id: str, attempt_id: str) -> None:
        if worker_id == PREFILL:
            self.prefill.handle(hand.Cancelled(attempt_id))
        else:
            self.decode.handle(adm.Cancelled(attempt_id))

    def _drop_router(self, worker_id: str) -> None:
        """A worker takes the router for lost, drops its work and says so."""
        worker, side = (
            (self.prefill, "prefill") if worker_id == PREFILL else (self.decode, "decode")
        )
        worker.drop_router()
        self.network.post(f"{side}>router", partial(self.router.give_up, worker_id))
