"""A worker whose own thread is stuck says so, within five seconds and with the reason."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry

from cli.worker_status import LONGER, STUCK, Readiness, serve_status
from engine.batch import Batch
from engine.thread import EngineThread
from kvtransfer import thread as transfer_thread
from kvtransfer.events import SendFailed
from kvtransfer.inproc import InProcessNetwork
from kvtransfer.thread import TransferThread
from protocol.errors import ConfigError

NOTICED = 5.0  # seconds, as promised


class Engine:
    """An engine whose step lasts until it is let go."""

    def __init__(self) -> None:
        self.phase_seconds: dict[str, float] = {}
        self.go = threading.Event()

    def run(self, batch: Batch) -> list[int]:
        assert self.go.wait(30.0)
        return []


@pytest.fixture
def transfer() -> Iterator[TransferThread]:
    rows = torch.zeros((4, 64), dtype=torch.uint8)
    thread = TransferThread(rows, InProcessNetwork().factory(), lambda event: None)
    thread.start()
    yield thread
    thread.stop()


class Steps:
    """An engine thread's times, by hand."""

    running_for = 0.0
    longest = 0.0


def noticed(readiness: Readiness) -> str:
    """Wait until the worker is not ready; why."""
    until = time.monotonic() + NOTICED
    while (reason := readiness.objection()) is None:
        assert time.monotonic() < until, "nobody noticed"
        time.sleep(0.05)
    return reason


def test_a_stuck_transfer_thread(transfer: TransferThread) -> None:
    readiness, go = Readiness(transfer, Steps()), threading.Event()
    assert readiness.objection() is None
    transfer._command(lambda: bool(go.wait(30.0)) and None)
    assert "transfer thread has been stuck" in noticed(readiness)
    go.set()
    until = time.monotonic() + NOTICED
    while readiness.objection() is not None:
        assert time.monotonic() < until


def test_an_ended_transfer_thread(transfer: TransferThread) -> None:
    readiness = Readiness(transfer, Steps())
    transfer.stop()
    assert readiness.objection() == "the transfer thread has ended"


def test_an_idle_transfer_thread_is_not_stuck(
    transfer: TransferThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.worker_status.STUCK", 0.5)
    readiness, until = Readiness(transfer, Steps()), time.monotonic() + 2 * transfer_thread.NAP
    while time.monotonic() < until:
        assert readiness.objection() is None
        time.sleep(0.05)


def test_a_lost_peer_changes_nothing() -> None:
    network, failed = InProcessNetwork(), threading.Event()
    rows = torch.zeros((4, 64), dtype=torch.uint8)
    thread = TransferThread(rows, network.factory(), lambda event: failed.set())
    thread.start()
    thread.send_blocks(b"inproc-gone", 1, 0, [1], [1])
    assert failed.wait(NOTICED), SendFailed
    assert Readiness(thread, Steps()).objection() is None
    thread.stop()


async def test_a_stuck_step(transfer: TransferThread) -> None:
    engine = Engine()
    thread = EngineThread(engine, CollectorRegistry())  # type: ignore[arg-type]
    readiness = Readiness(transfer, thread)
    assert readiness.objection() is None
    step = thread.run(Batch(()))
    assert "engine has been in one step" in noticed(readiness)
    engine.go.set()
    await step
    assert thread.longest > STUCK
    assert readiness.objection() is None
    for _ in range(500):  # what was stuck once is no measure for ever
        await thread.run(Batch(()))
    assert thread.longest < STUCK / LONGER
    thread.close()


@pytest.mark.parametrize(("running_for", "ready"), [(2.0 * LONGER - 0.1, True), (8.1, False)])
def test_steps_that_always_take_long_are_not_stuck(
    transfer: TransferThread, running_for: float, ready: bool
) -> None:
    steps = Steps()
    steps.longest, steps.running_for = 2.0, running_for
    assert (Readiness(transfer, steps).objection() is None) == ready


def test_it_is_served_beside_the_metrics(transfer: TransferThread) -> None:
    steps = Steps()
    url = serve_status("127.0.0.1", 0, CollectorRegistry(), Readiness(transfer, steps))
    ready = url.replace("/metrics", "/ready")
    with urllib.request.urlopen(url) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(ready) as answer:
        assert answer.read() == b"ready\n"
    steps.running_for = 100.0
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        urllib.request.urlopen(ready)
    assert b"one step for 100.0 s" in caught.value.read()
    caught.value.close()
    port = int(url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(ConfigError, match="metrics"):
        serve_status("127.0.0.1", port, CollectorRegistry(), Readiness(transfer, steps))
