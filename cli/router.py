"""The router process: HTTP in front, the workers' link behind."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry

from cli.addresses import is_local, is_loopback
from cli.what_if import Simulation
from engine.checkpoint import resolve_checkpoint
from protocol.errors import ConfigError
from protocol.link import Server, read_cluster_key
from router.api_keys import ApiKeys
from router.app import RouterSettings, create_app
from router.disaggregation import Disaggregation, Mode
from router.dispatch import Dispatcher
from router.http_protocol import BoundedHttpProtocol
from router.policy import PolicyName
from router.text import TextModel

if TYPE_CHECKING:  # needs an extra
    from router.tracing import Tracing

GRACE = 2  # seconds that requests have to end in once the router is asked to


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything a router is told at start."""

    model: str
    served_model_name: str | None
    host: str
    port: int
    control: str  # ZMQ endpoint for the workers
    cluster_key_file: Path | None = None
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()  # () where API keys are enough to read /admin
    insecure: bool = False  # let everybody in, from other hosts too
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    request_timeout: float = 600.0  # seconds
    max_num_requests: int = 1024
    max_queue_time: float = 30.0  # seconds
    max_retries: int = 3
    disaggregation: Mode = "auto"
    local_prefill_tokens: int | None = None  # None: as measured
    policy: PolicyName = "prefix-aware"
    otlp_endpoint: str | None = None  # of the collector that gets traces


async def serve_router(config: RouterConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError when it cannot start."""
    if config.cluster_key_file is None and not is_local(config.control):
        raise ConfigError(
            f"--control {config.control} is reachable from other hosts: give --cluster-key-file "
            "(make one with `kvferry keygen FILE`)"
        )
    if not config.api_keys and not config.insecure and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} is reachable from other hosts: give --api-key-file or set "
            "KVFERRY_API_KEY, or let everybody in with --insecure"
        )
    key = read_cluster_key(config.cluster_key_file) if config.cluster_key_file else None
    text = TextModel.load(
        resolve_checkpoint(config.model, weights=False),
        config.tool_call_parser,
        config.reasoning_parser,
    )
    disaggregation = Disaggregation(
        config.disaggregation, config.local_prefill_tokens, config.policy
    )
    name = config.served_model_name or config.model
    tracing = _tracing(config.otlp_endpoint, name) if config.otlp_endpoint else None
    listening = listen(config.host, config.port)
    link = Server(config.control, key)
    metrics = CollectorRegistry()
    dispatcher = Dispatcher(
        link,
        metrics,
        request_timeout=config.request_timeout,
        max_num_requests=config.max_num_requests,
        max_queue_time=config.max_queue_time,
        max_retries=config.max_retries,
        disaggregation=disaggregation,
    )
    settings = RouterSettings(
        served_model_name=name,
        api_keys=ApiKeys(config.api_keys),
        admin_keys=ApiKeys(config.admin_keys),
    )
    simulation = Simulation()
    on_end = tracing.ended if tracing else None
    app = create_app(settings, text, dispatcher, metrics, simulation.predict, on_end)
    server = _Server(
        uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            log_config=None,  # this process's
            log_level="warning",
            timeout_graceful_shutdown=2 * GRACE,  # then uvicorn drops connections
            lifespan="off",
            ws="none",
        )
    )
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        server.handle_exit(number, None)
        loop.call_later(GRACE, dispatcher.shut_down)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    events = asyncio.create_task(dispatcher.run())
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        done, _ = await asyncio.wait({events, serving}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        events.cancel()
        link.close()
        await simulation.close()
        if tracing:
            tracing.close()


def _tracing(endpoint: str, model: str) -> Tracing:
    """Raises ConfigError where there is no OpenTelemetry."""
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-endpoint {endpoint} is no http:// or https:// address")
    try:
        from router.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint needs OpenTelemetry, pip install 'kvferry[otel]': {error}"
        ) from error
    return Tracing.to(endpoint, model)


class _Server(uvicorn.Server):
    """Leaves signals to the process: being asked to stop is not a failure."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """See uvicorn.Server."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError when the address cannot be had."""
    try:
        listening = socket.create_server((host, port), backlog=1024, reuse_port=False)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    # Connections inherit it. Without it a stream's first event waits for the acknowledgement of
    # the head before it: 40 ms. (asyncio sets it only on sockets made with IPPROTO_TCP.)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
