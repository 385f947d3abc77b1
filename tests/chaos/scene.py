"""A deployment that scenarios play on: what they do to its processes, and what they check."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.chaos.asks import Reference, draw, mixed
from tests.chaos.clients import FINISHED, Clients
from tests.chaos.figures import Figures
from tests.stack import IDLE, START, Stack, eventually

NUM_STREAMS = 8
EARLY = 0.2  # seconds in which prompts are computed and handed off
LEAKED = 40.0  # seconds after which what is not given back never will be: grants expire in 30
LATEST = 0.7  # share of all tokens at which a disturbance comes at the latest


class CannotPlayError(Exception):
    """This machine cannot play a scenario; the message says what it lacks."""


@dataclass(frozen=True)
class Scene:
    """A running stack, clients of it, and an engine that knows what is right."""

    stack: Stack
    clients: Clients
    reference: Reference
    workers: Mapping[str, Sequence[str]]  # own arguments of each, by name

    def kill(self, name: str) -> None:
        """``kill -9``."""
        victim = self.stack.processes.pop(name)
        victim.kill()
        victim.wait()

    def drain(self, name: str) -> int:
        """Tell a worker to leave, through the router, and wait for it; its exit status."""
        self.stack.client.post(f"/admin/workers/{name}/drain").raise_for_status()
        return self.stack.processes.pop(name).wait(START)

    def restart(self, name: str) -> None:
        """Start a process that has ended, on the same address."""
        if name == "router":
            self.stack.start_router()
        else:
            self.stack.start_worker(name.partition("-")[0], name, self.workers[name])

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The process stands still (SIGSTOP) for the block's time."""
        process = self.stack.processes[name]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def pool(self, role: str) -> list[str]:
        """The names of a role's workers."""
        return [name for name in self.workers if name.startswith(role)]

    def wait_for_workers(self) -> None:
        """Until the router knows of every worker that runs, and of no other."""
        pids = {self.stack.processes[name].pid for name in self.workers}

        def known() -> bool:
            self.stack.wait_for_workers(len(pids))
            return {row["pid"] for row in self.stack.workers()} == pids

        assert eventually(known, START), self.stack.workers()

    def seconds_to_full_service(self, rng: random.Random) -> float:
        """Until every worker serves and a round of requests is answered, all of them rightly."""
        began = time.monotonic()
        asks = draw(rng, 2 * len(self.workers), prompt=(1, 40), output=(4, 8))
        answers = self.reference.answers(asks)

        def answered() -> bool:
            streams = [self.clients.open(ask) for ask in asks]
            self.clients.join(streams)
            if any(stream.ending != FINISHED for stream in streams):
                return False
            assert [stream.token_ids for stream in streams] == answers, "wrong tokens after healing"
            return True

        self.wait_for_workers()
        assert eventually(answered, START), "no full service after healing"
        return time.monotonic() - began

    def seconds_to_first_token(self, rng: random.Random, length: int) -> float:
        """For a prompt of so many tokens that nothing is cached of, with nothing else to do."""
        [ask] = draw(rng, 1, prompt=(length, length), output=(1, 1))
        stream = self.clients.open(ask)
        self.clients.join([stream])
        assert stream.ending == FINISHED, stream
        return stream.longest_wait

    def settle(self, figures: Figures, within: float = IDLE) -> None:
        """Restart whoever is missing; note what has not been given back in time."""
        for name in ["router", *self.workers]:
            if name not in self.stack.processes:
                self.restart(name)
        self.wait_for_workers()
        began = time.monotonic()
        left = self.stack.not_given_back(within)
        figures.blocks_leaked = int(sum(n for name, n in left.items() if "blocks" in name))
        figures.require(not left, f"not given back: {', '.join(sorted(left))}")
        if left:
            held = {row["id"]: row["requests"] for row in self.stack.workers()}
            later = self.stack.not_given_back(LEAKED)
            figures.evidence += [
                f"after {within:g} s: {left}; attempts that the router had there: {held}",
                f"after {time.monotonic() - began:.1f} s: {later or 'all given back'}",
            ]


Disturb = Callable[[Figures], None]


def play_disturbed(scene: Scene, rng: random.Random, disturb: Disturb) -> Figures:
    """Disturb streams at a moment that ``rng`` draws.

    Clients must get the tokens of an undisturbed engine, and no errors but those that ``disturb``
    allows.
    """
    asks = mixed(rng, NUM_STREAMS)
    answers = scene.reference.answers(asks)
    figures = Figures()
    began = time.monotonic()
    streams = [scene.clients.open(ask) for ask in asks]
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, EARLY))
    else:
        count = rng.uniform(0, LATEST) * sum(map(len, answers))
        eventually(lambda: sum(len(stream.token_ids) for stream in streams) >= count, START)
    figures.open_then = sum(not stream.ending for stream in streams)
    figures.disturbed_after = time.monotonic() - began
    disturb(figures)
    scene.clients.join(streams)
    figures.compare(streams, answers, scene.reference)
    scene.settle(figures)
    return figures
