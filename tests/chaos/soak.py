"""Clients at 0.8 of what a deployment can serve, for long, while its processes die and restart.

    python -m tests.chaos.soak [--minutes 30]

Every request must be accounted for: finished with the right tokens, cancelled by its client, or
ended by an explicit error; a connection may be lost only with the router. No process may grow.
Ends with status 1 otherwise.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.chaos import settings
from tests.chaos.asks import Ask, mixed
from tests.chaos.clients import FINISHED, Clients, Stream
from tests.chaos.figures import Figures, listed
from tests.chaos.scene import Scene
from tests.checkpoints import CHECKPOINTS, write_checkpoint

CATALOGUE = 32  # different requests
AT_ONCE = 16  # clients that find out the capacity
MEASURED = 20.0  # seconds they take for it
SHARE = 0.8  # of the capacity
CANCELLED_SHARE = 0.1  # of the requests, each within
CANCELLED_WITHIN = 1.0  # seconds
PAUSE = 5.0, 20.0  # seconds between disturbances
SETTLED = 60.0  # seconds of a process's life after which its memory is looked at
GROWTH = 0.1  # of its memory then, which it may gain until its end

LOST = {"cut", "unreachable"}


class Arrivals:
    """``with Arrivals(...) as arrivals``: requests come at random times, ``rate`` a second."""

    def __init__(
        self,
        clients: Clients,
        asks: Sequence[Ask],
        answers: Sequence[Sequence[int]],
        rate: float,
        rng: random.Random,
    ) -> None:
        self.num_opened = 0
        self.endings: Counter[str] = Counter()
        self.num_wrong = 0  # streams with a token that is not the answer's
        self.lost: list[Stream] = []  # whose connection broke
        self._clients = clients
        self._answers = dict(zip(asks, answers, strict=True))
        self._rate = rate
        self._rng = rng
        self._open: list[Stream] = []
        self._cancels: list[tuple[float, Stream]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arrivals")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._clients.join(self._open)
        self._take_ended()

    def _run(self) -> None:
        asks = list(self._answers)
        while not self._over.wait(self._rng.expovariate(self._rate)):
            stream = self._clients.open(self._rng.choice(asks))
            self._open.append(stream)
            self.num_opened += 1
            now = time.monotonic()
            if self._rng.random() < CANCELLED_SHARE:
                self._cancels.append((now + self._rng.uniform(0, CANCELLED_WITHIN), stream))
            self._clients.cancel(stream for at, stream in self._cancels if at <= now)
            self._cancels = [(at, stream) for at, stream in self._cancels if at > now]
            self._take_ended()

    def _take_ended(self) -> None:
        ended = [stream for stream in self._open if stream.ending]
        self._open = [stream for stream in self._open if not stream.ending]
        for stream in ended:
            self.endings[stream.ending] += 1
            answer = self._answers[stream.ask]
            count = len(answer) if stream.ending == FINISHED else len(stream.token_ids)
            self.num_wrong += stream.token_ids != answer[:count]
            self.lost += [stream] if stream.ending in LOST else []


class Disturbances:
    """What is done to a scene's processes, one thing at a time."""

    def __init__(self, scene: Scene, figures: Figures, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.outages: list[tuple[float, float]] = []  # of the router, from and to
        self._scene = scene
        self._figures = figures
        self._rng = rng
        self._kinds: list[Callable[[], None]] = [
            self._kill,
            self._kill,
            self._freeze,
            self._drain,
            self._kill_router,
        ]

    def one(self) -> None:
        """Disturb, repair, and wait until every worker serves."""
        kind = self._rng.choice(self._kinds)
        kind()
        self._scene.wait_for_workers()
        self.counts[kind.__name__.removeprefix("_").replace("_", " ")] += 1

    def explain(self, stream: Stream) -> bool:
        """Whether the router was away in a stream's time."""
        return any(stream.opened <= to and stream.ended >= since for since, to in self.outages)

    def _victim(self) -> str:
        return self._rng.choice(list(self._scene.workers))

    def _kill(self) -> None:
        victim = self._victim()
        self._scene.kill(victim)
        self._scene.restart(victim)

    def _freeze(self) -> None:
        with self._scene.frozen(self._victim()):
            time.sleep(self._rng.uniform(0.2, 4.0))

    def _drain(self) -> None:
        leaving = self._victim()
        status = self._scene.drain(leaving)
        self._figures.require(status == 0, f"a drained worker ended with status {status}")
        self._scene.restart(leaving)

    def _kill_router(self) -> None:
        since = time.monotonic()
        self._scene.kill("router")
        self._scene.restart("router")
        self._scene.wait_for_workers()
        self.outages.append((since, time.monotonic()))


class Memory:
    """How much each process has grown since it had settled."""

    def __init__(self) -> None:
        self.worst = 0.0  # as a share
        self._settled: dict[int, int] = {}  # resident bytes by pid

    def sample(self, scene: Scene) -> None:
        """Look at every process that has lived long enough."""
        for process in scene.stack.processes.values():
            info = psutil.Process(process.pid)
            if time.time() - info.create_time() >= SETTLED:
                resident = info.memory_info().rss
                before = self._settled.setdefault(process.pid, resident)
                self.worst = max(self.worst, resident / before - 1)


def capacity(scene: Scene, asks: Sequence[Ask], rng: random.Random) -> float:
    """Requests that are answered a second while as many clients as fit never pause."""
    began = time.monotonic()
    streams = [scene.clients.open(rng.choice(asks)) for _ in range(AT_ONCE)]
    num_ended = 0
    while time.monotonic() < began + MEASURED:
        time.sleep(0.005)
        for index, stream in enumerate(streams):
            if stream.ending:
                num_ended += 1
                streams[index] = scene.clients.open(rng.choice(asks))
    scene.clients.cancel(streams)
    scene.clients.join(streams)
    return num_ended / MEASURED


def main(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.1)] = 30.0,
    seed: Annotated[int, typer.Option(help="Of requests and disturbances.")] = 0,
) -> None:
    """Serve for a long time under disturbances."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    rng, console, figures, memory = random.Random(seed), Console(), Figures(), Memory()
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(CHECKPOINTS["llama"], Path(folder) / "llama")
        with settings.pools(model) as scene, Progress(console=console) as progress:
            asks = mixed(rng, CATALOGUE)
            answers = scene.reference.answers(asks)
            task = progress.add_task("capacity", total=60 * minutes)
            rate = SHARE * capacity(scene, asks, rng)
            disturbances = Disturbances(scene, figures, rng)
            began = time.monotonic()
            with Arrivals(scene.clients, asks, answers, rate, random.Random(seed + 1)) as arrivals:
                while (now := time.monotonic()) < began + 60 * minutes:
                    memory.sample(scene)
                    shown = f"{arrivals.num_opened} requests, {rate:.1f}/s"
                    progress.update(task, completed=now - began, description=shown)
                    time.sleep(rng.uniform(*PAUSE))
                    disturbances.one()
            memory.sample(scene)
            scene.settle(figures)
    judge(figures, arrivals, disturbances, memory)
    table = Table("figure", "value")
    table.add_row("requests", f"{arrivals.num_opened} at {rate:.2f}/s")
    table.add_row("endings", listed(arrivals.endings))
    table.add_row("disturbances", listed(disturbances.counts))
    table.add_row("streams with wrong tokens", str(arrivals.num_wrong))
    table.add_row("blocks leaked", str(figures.blocks_leaked))
    table.add_row("most that a process grew", f"{memory.worst:.1%}")
    table.add_row("promise", ", ".join(figures.broken) or "held")
    console.print(table)
    raise typer.Exit(bool(figures.broken))


def judge(figures: Figures, arrivals: Arrivals, disturbances: Disturbances, memory: Memory) -> None:
    """Note every promise that did not hold."""
    accounted = sum(arrivals.endings.values())
    figures.require(accounted == arrivals.num_opened, "requests without an end")
    figures.require(all(map(disturbances.explain, arrivals.lost)), "connections lost for nothing")
    for ending in ("unanswered", "malformed"):
        figures.require(not arrivals.endings[ending], f"answers that were {ending}")
    figures.require(not arrivals.num_wrong, "wrong tokens")
    figures.require(memory.worst <= GROWTH, f"a process grew by more than {GROWTH:.0%}")


if __name__ == "__main__":
    typer.run(main)
