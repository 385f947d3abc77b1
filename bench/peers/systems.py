"""Whole systems through HTTP: one prefill and one decode worker, a core each, streamed answers.

The client is the driver itself; it, the router and the proxy share the two workers' cores, for
every system alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import os
import random
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.peers.compare import Measure, Peer, PeerError
from bench.peers.engines import REPOSITORY, SCRIPTS, vllm_variables
from bench.peers.install import RECIPES, Site
from bench.peers.process import PeerProcess, running
from bench.peers.record import Figures
from bench.peers.transfers import SEGMENTS
from bench.streams import stream_all

NAME = "model"  # by which the API knows it
MAX_MODEL_LEN = 2048
KV_GIB = 2  # of each worker
START_TIMEOUT = 400.0  # seconds; vLLM compiles the model the first time
POLL = 0.2  # seconds


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at once, that many times over; no two prompts share a prefix."""

    concurrency: int
    rounds: int
    prompt_tokens: int = 480
    output_tokens: int = 64

    def __str__(self) -> str:
        return f"{self.concurrency} at once"


CASES = (Load(1, 4), Load(8, 2), Load(16, 2))
METRICS = ("TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "tokens/s")


def peers(model: Path, site: Site) -> list[Peer]:
    """The systems as rows. Both get a short load before the clock counts."""
    return [
        Peer("kvferry", partial(_kvferry, model, site)),
        Peer(
            "vllm, NIXL over TCP",
            partial(_vllm, model, site),
            partial(site.require, "vllm"),
        ),
    ]


@contextlib.contextmanager
def _kvferry(model: Path, site: Site, bound: float) -> Iterator[tuple[dict[str, Any], Measure]]:
    port = _free_port()
    options = {
        "port": port,
        "model": model,
        "served-model-name": NAME,
        "prefill": 1,
        "decode": 1,
        "max-model-len": MAX_MODEL_LEN,
        "kv-cache-memory": KV_GIB,
        "disaggregation": "always",
        "max-queue-time": 600,  # all are served, however late
    }
    command = [sys.executable, "-m", "cli.main", "serve", *_flags(options)]
    variables = {"PYTHONPATH": str(REPOSITORY)}
    log = site.logs / "system-kvferry.log"
    with running(command, variables, site.cores, log, answers=False) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{url}/ready", [process])
        about = {"torch": importlib.metadata.version("torch")}
        yield about, _measure(model, url, bound)


@contextlib.contextmanager
def _vllm(model: Path, site: Site, bound: float) -> Iterator[tuple[dict[str, Any], Measure]]:
    """Two servers, the first core to prefill, the last to decode.

    Not compiled: on a core that is its own that was no faster, and takes a minute to start.
    """
    python = site.python("vllm")
    ports = {"prefill": _free_port(), "decode": _free_port(), "proxy": _free_port()}
    connector = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for role, core in (("prefill", site.cores[0]), ("decode", site.cores[-1])):
            options = {
                "host": "127.0.0.1",
                "port": ports[role],
                "model": model,
                "served-model-name": NAME,
                "dtype": "bfloat16",
                "max-model-len": MAX_MODEL_LEN,
                "max-num-batched-tokens": MAX_MODEL_LEN,
                "kv-transfer-config": json.dumps(connector),
            }
            command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
            variables = {
                "HF_HUB_OFFLINE": "1",
                **vllm_variables(site, [core]),
                "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_free_port()),
                "UCX_TLS": "tcp",
                **SEGMENTS,
            }
            log = site.logs / f"system-vllm-{role}.log"
            server = running([*command, *_flags(options)], variables, [core], log, answers=False)
            processes.append(stack.enter_context(server))
        urls = {role: f"http://127.0.0.1:{port}" for role, port in ports.items()}
        command = [python, str(SCRIPTS / "vllm_proxy.py"), str(ports["proxy"])]
        command += [urls["prefill"], urls["decode"]]
        log = site.logs / "system-vllm-proxy.log"
        processes.append(stack.enter_context(running(command, {}, site.cores, log, answers=False)))
        for role in ("prefill", "decode"):
            _wait_until_ready(f"{urls[role]}/health", processes)
        _keep_to_core(processes[0].pid, site.cores[0])
        _keep_to_core(processes[1].pid, site.cores[-1])
        yield {"recipe": RECIPES["vllm"].stamp}, _measure(model, urls["proxy"], bound)


def _keep_to_core(pid: int, core: int) -> None:
    """Keep a server's processes to one core, and let their main threads go first there.

    vLLM's NIXL connector binds the thread that computes to the host's last core, where the other
    server's would be as well; and NIXL's progress thread, which polls without a pause, would take
    half of the core.
    """
    server = psutil.Process(pid)
    for process in (server, *server.children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, [core])
            if thread.id != process.pid:
                os.setpriority(os.PRIO_PROCESS, thread.id, 19)


def _flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, processes: Sequence[PeerProcess]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        for process in processes:
            process.check_alive()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(POLL)
    raise PeerError("was not ready in time")


def _measure(model: Path, url: str, bound: float) -> Measure:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    numbers = itertools.count()
    deadline = time.monotonic() + bound

    def send(load: Load) -> Figures:
        answers: list[tuple[float, list[float]]] = []
        start = time.perf_counter()
        for _ in range(load.rounds):
            bodies = [_body(next(numbers), load, vocab_size) for _ in range(load.concurrency)]
            sent = time.perf_counter()
            answers += [(sent, arrivals) for arrivals in _stream(url, bodies, deadline)]
        return summarize(answers, load.output_tokens, time.perf_counter() - start)

    send(Load(2, 1, output_tokens=4))
    return lambda load: (send(load), None)


def _stream(url: str, bodies: list[dict[str, Any]], deadline: float) -> list[list[float]]:
    async def within_deadline() -> list[list[float]]:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await stream_all(f"{url}/v1/completions", bodies)

    try:
        return asyncio.run(within_deadline())
    except TimeoutError:
        raise PeerError("ran out of its time") from None
    except (RuntimeError, OSError) as error:
        raise PeerError(str(error)[-300:]) from None


def _body(number: int, load: Load, vocab_size: int) -> dict[str, Any]:
    rng = random.Random(number)
    return {
        "model": NAME,
        "prompt": [rng.randrange(1000, vocab_size) for _ in range(load.prompt_tokens)],
        "max_tokens": load.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,  # an event for every token, even one that shows no text
    }


def summarize(
    answers: Sequence[tuple[float, Sequence[float]]], output_tokens: int, seconds: float
) -> Figures:
    """Figures of answers, each the time it was asked for and the times of its events.

    Raises PeerError when an answer has fewer than two events, or none for most of its tokens.
    """
    if any(len(arrivals) < max(2, output_tokens // 2) for _, arrivals in answers):
        raise PeerError(f"an answer of {output_tokens} tokens came in too few events")
    waits = [arrivals[0] - sent for sent, arrivals in answers]
    gaps = sorted(b - a for _, arrivals in answers for a, b in itertools.pairwise(arrivals))
    values = (
        1e3 * statistics.median(waits),
        1e3 * statistics.median(gaps),
        1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        len(answers) * output_tokens / seconds,
    )
    return dict(zip(METRICS, values, strict=True))
