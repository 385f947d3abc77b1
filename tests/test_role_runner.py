"""A worker's role ends only when nothing of it is left; then the next one serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from cli.role_runner import RoleRunner
from kvtransfer.events import TransferEvent
from protocol.messages import ChangeRole, Message, Role, WorkerLoad
from tests.router_scene import SOON


@dataclass(eq=False)
class Played:
    """A role that does what a test says."""

    role: Role
    epoch: int
    idle: bool = True
    told: list[str] = field(default_factory=list)
    running: bool = False

    def load(self) -> WorkerLoad:
        return WorkerLoad()

    def metrics(self) -> Iterator[Metric]:
        return iter(())

    def leave(self) -> None:
        self.told.append("leave")

    def drop_router(self, router_id: str) -> None:
        self.told.append(router_id)

    def from_router(self, router_id: str, message: Message) -> None:
        raise AssertionError

    def from_transfer(self, event: TransferEvent) -> None:
        raise AssertionError

    async def run(self) -> None:
        self.running = True
        try:
            await asyncio.Event().wait()
        finally:
            self.running = False


@dataclass(eq=False)
class Link:
    """Keeps what a router is told."""

    told: list[str] = field(default_factory=list)

    def leave(self, next_role: Role | None = None) -> None:
        self.told.append(f"leave for {next_role}")

    def end_role(self, next_role: Role) -> None:
        self.told.append(f"end for {next_role}")

    def register_anew(self) -> None:
        self.told.append("register")


class Scene:
    """A worker that begins as prefill."""

    def __init__(self, drain_timeout: float = SOON) -> None:
        self.roles: list[Played] = []
        self.in_step = False
        self.link = Link()
        self.metrics = CollectorRegistry()
        self.runner = RoleRunner(
            "prefill",
            self._build,
            in_step=lambda: self.in_step,
            drain_timeout=drain_timeout,
            metrics=self.metrics,
        )

    def _build(self, role: Role, epoch: int) -> Played:
        self.roles.append(Played(role, epoch))
        return self.roles[-1]

    def ask(self, role: Role, epoch: int | None = None) -> None:
        self.runner.change(ChangeRole(epoch=epoch or self.runner.epoch, role=role))

    async def until_told(self, *words: str) -> None:
        async with asyncio.timeout(SOON):
            while True:
                if self.link.told == list(words):
                    return
                await asyncio.sleep(0.005)

    async def stays(self) -> None:
        """Long enough for the runner to do what it must not."""
        told = list(self.link.told)
        await asyncio.sleep(0.1)
        assert self.link.told == told


@asynccontextmanager
async def running(scene: Scene) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(scene.runner.run([scene.link]))
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


FLIPPED = ("leave for decode", "end for decode", "register")


async def test_an_idle_worker_takes_the_other_role_and_back() -> None:
    scene = Scene()
    async with running(scene):
        scene.ask("decode")
        await scene.until_told(*FLIPPED)
        first, second = scene.roles
        assert (second.role, scene.runner.role) == ("decode", "decode")
        assert second.epoch == scene.runner.epoch != first.epoch
        await asyncio.sleep(0)
        assert (first.running, second.running) == (False, True)
        scene.ask("prefill")
        await scene.until_told(*FLIPPED, "leave for prefill", "end for prefill", "register")
    changes = scene.metrics.get_sample_value("kvferry_role_changes_total", {"role": "decode"})
    assert changes == 1


async def test_a_role_is_drained_first_and_its_last_step_awaited() -> None:
    scene = Scene()
    async with running(scene):
        scene.roles[0].idle, scene.in_step = False, True
        scene.ask("decode")
        await scene.until_told("leave for decode")
        await scene.stays()
        scene.roles[0].idle = True
        await scene.until_told("leave for decode", "end for decode")
        await scene.stays()
        assert scene.roles[0].running
        scene.in_step = False
        await scene.until_told(*FLIPPED)


async def test_what_is_left_after_the_drain_timeout_is_given_up_but_awaited() -> None:
    scene = Scene(drain_timeout=0.05)
    async with running(scene):
        scene.roles[0].idle = False
        scene.ask("decode")
        await scene.until_told("leave for decode", "end for decode")
        await scene.stays()
        scene.roles[0].idle = True
        await scene.until_told(*FLIPPED)


async def test_only_what_is_asked_of_the_present_role_counts() -> None:
    scene = Scene()
    async with running(scene):
        scene.ask("prefill")
        scene.ask("decode", epoch=1)
        await scene.stays()
        scene.ask("decode")
        scene.ask("decode")
        await scene.until_told(*FLIPPED)
        scene.ask("prefill", epoch=scene.roles[0].epoch)
        await scene.stays()


async def test_a_worker_that_leaves_meanwhile_takes_no_other_role() -> None:
    scene = Scene(drain_timeout=0.05)
    async with running(scene) as task:
        scene.roles[0].idle = False
        scene.ask("decode")
        await scene.until_told("leave for decode")
        scene.runner.leave()
        scene.roles[0].idle = True
        await scene.stays()
        assert not task.done()
        assert len(scene.roles) == 1
        assert scene.roles[0].told == ["leave", "leave"]
