"""More work than fits, and clients in great numbers: nothing wedges, nothing grows."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from tests.chaos.asks import draw
from tests.chaos.clients import FINISHED
from tests.chaos.figures import Figures
from tests.chaos.scene import Scene
from tests.stack import IDLE, eventually

NUM_CONNECTIONS = 200
NUM_CANCELLED = 1000
AT_ONCE = 50  # of those
WARM_UP = 50  # the first ones make threads, connections and buffers that stay
GROWTH = 48 << 20  # bytes that allocators may keep
IDLE_SHARE = 0.05  # of a core
PREEMPTIONS = "kvferry_num_preemptions_total"
REFUSED = "429 overloaded"


def decode_overloaded(scene: Scene, rng: random.Random) -> Figures:
    """A running batch of 1.5 times the decode pool's KV: all requests end, none waits for ever."""
    # Short answers teach the router to expect such; 8 long ones then need 13 of 64 blocks each.
    lesson = [scene.clients.open(a) for a in draw(rng, 24, prompt=(4, 8), output=(2, 4))]
    scene.clients.join(lesson)
    asks = draw(rng, 24, prompt=(30, 40), output=(180, 190))
    answers = scene.reference.answers(asks)
    figures = Figures(allowed=frozenset({REFUSED}))
    before = scene.stack.metrics("decode")[PREEMPTIONS]
    streams = [scene.clients.open(ask) for ask in asks]
    scene.clients.join(streams)
    figures.compare(streams, answers, scene.reference)
    figures.require(any(s.ending == FINISHED for s in streams), "no request finished")
    short = scene.stack.metrics("decode")[PREEMPTIONS] > before
    figures.require(short, "the pool was never short of blocks")
    scene.settle(figures)
    return figures


def connections(scene: Scene, rng: random.Random) -> Figures:
    """200 connections that are closed at any point of a request: no thread or socket stays."""
    [ask] = draw(rng, 1, prompt=(20, 20), output=(20, 20))
    body = json.dumps(ask.body()).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    request = head % len(body) + body
    where = urlsplit(scene.stack.url)

    def connect(count: int) -> None:
        for _ in range(count):
            with socket.create_connection((where.hostname, where.port)) as connection:
                connection.sendall(request[: rng.randint(0, len(request))])

    return _flood(scene, rng, connect, NUM_CONNECTIONS)


def cancel_flood(scene: Scene, rng: random.Random) -> Figures:
    """1000 requests whose clients go away at any moment: no thread, socket or memory stays."""

    def cancel(count: int) -> None:
        for _ in range(0, count, AT_ONCE):
            asks = draw(rng, min(count, AT_ONCE), prompt=(1, 80), output=(10, 100))
            streams = [scene.clients.open(ask) for ask in asks]
            for stream in streams:
                time.sleep(rng.uniform(0, 0.01))
                scene.clients.cancel([stream])
            scene.clients.join(streams)

    return _flood(scene, rng, cancel, NUM_CANCELLED)


def _flood(scene: Scene, rng: random.Random, flood: Callable[[int], None], count: int) -> Figures:
    figures = Figures(streams=count)
    scene.seconds_to_full_service(rng)  # an engine's thread begins with its first step
    flood(WARM_UP)
    scene.settle(figures)
    before = _sizes(scene)
    flood(count)
    scene.settle(figures)

    def as_before() -> bool:
        return all(
            size.threads <= before[name].threads and size.descriptors <= before[name].descriptors
            for name, size in _sizes(scene).items()
        )

    figures.require(eventually(as_before, IDLE), "threads or descriptors are left")
    after = _sizes(scene)
    grown = max(size.resident - before[name].resident for name, size in after.items())
    figures.require(grown < GROWTH, f"memory grew by more than {GROWTH >> 20} MiB")
    figures.evidence += [f"{name}: {before[name]}, then {size}" for name, size in after.items()]
    return figures


class _Sizes(NamedTuple):
    threads: int
    descriptors: int
    resident: int  # bytes


def _sizes(scene: Scene) -> dict[str, _Sizes]:
    """Of each process."""
    sizes = {}
    for name, process in scene.stack.processes.items():
        info = psutil.Process(process.pid)
        sizes[name] = _Sizes(info.num_threads(), info.num_fds(), info.memory_info().rss)
    return sizes


def idle(scene: Scene, rng: random.Random) -> Figures:
    """Without requests no process uses 5 % of a core."""
    figures = Figures()
    scene.seconds_to_full_service(rng)
    scene.settle(figures)
    processes = {n: psutil.Process(p.pid) for n, p in scene.stack.processes.items()}
    for process in processes.values():
        process.cpu_percent()
    time.sleep(3.0)
    for name, process in processes.items():
        share = process.cpu_percent() / 100
        figures.require(share < IDLE_SHARE, f"{name} used {share:.0%} of a core idle")
    return figures
