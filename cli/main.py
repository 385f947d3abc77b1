"""The command line: reads options once into one frozen config and starts the process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import zmq.asyncio
from prometheus_client import disable_created_metrics
from rich.console import Console

from cli import advise, autopilot, bench, plan, pools, profile
from cli.checkpoint import locate, served_name
from cli.option_groups import HttpOptions, RouterOptions, TierOptions, WorkerOptions, grouped
from cli.options import ClusterKey, LogFormat, Model
from cli.sizes import parse_size
from protocol.errors import ConfigError, KvferryError
from protocol.logs import TEXT, format_logs
from protocol.messages import Role

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode in two separate pools.",
)


app.add_typer(pools.app, name="pools")
app.add_typer(bench.app, name="bench")
app.command()(plan.plan)
app.command()(advise.advise)
app.command()(autopilot.autopilot)
app.command()(profile.profile)


@app.command()
@grouped
def serve(
    http: HttpOptions,
    routing: RouterOptions,
    worker: WorkerOptions,
    tiers: TierOptions,
    model: Model = "demo",
    prefill: Annotated[
        int, typer.Option(help="Prefill workers; 0: decode workers compute prompts too.", min=0)
    ] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.", min=1)] = 1,
    threads_per_worker: Annotated[
        int | None,
        typer.Option(
            help="Threads of a CPU worker's engine. Default: its share of the cores.", min=1
        ),
    ] = None,
    pin: Annotated[
        bool | None,
        typer.Option(
            "--pin/--no-pin", help="Keep each worker to its share. Default: if above 1 core."
        ),
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Run a router and its workers as separate processes on this host."""
    from cli.serve import ServeConfig, serve

    keys, admin_keys = _api_keys(http), _admin_keys(http)
    os.environ["KVFERRY_API_KEY"] = " ".join(keys)  # not on the router's command line
    os.environ["KVFERRY_ADMIN_API_KEY"] = " ".join(admin_keys)
    named = replace(routing, served_model_name=routing.served_model_name or served_name(model))
    disk = tiers.kv_disk_size if tiers.kv_disk_dir else None
    config = ServeConfig(
        model=locate(model),
        num_prefill=prefill,
        num_decode=decode,
        host=http.host,
        port=http.port,
        api_key=keys[0] if keys else None,
        admin_key=admin_keys[0] if admin_keys else None,
        disaggregation=routing.disaggregation,
        log_format=log_format,
        threads_per_worker=threads_per_worker,
        pin=pin,
        router_args=_arguments(insecure=http.insecure, **asdict(named)),
        worker_args=_arguments(**asdict(worker)),
        tier_args=_arguments(kv_host_size=tiers.kv_host_size, kv_disk_size=disk),
        kv_disk_dir=tiers.kv_disk_dir,
    )
    _run(serve(config, Console()))


@app.command()
@grouped
def router(
    http: HttpOptions,
    routing: RouterOptions,
    model: Model = "demo",
    control: Annotated[
        str, typer.Option(help="Endpoint for the workers: tcp://HOST:PORT or ipc://PATH.")
    ] = "tcp://127.0.0.1:8100",
    log_format: LogFormat = "text",
    cluster_key_file: ClusterKey = None,
) -> None:
    """Run the router alone. Needs the model's tokenizer, not its weights."""
    from cli.router import RouterConfig, serve_router

    named = replace(routing, served_model_name=routing.served_model_name or served_name(model))
    config = RouterConfig(
        model=locate(model),
        host=http.host,
        port=http.port,
        control=control,
        cluster_key_file=cluster_key_file,
        api_keys=_api_keys(http),
        admin_keys=_admin_keys(http),
        insecure=http.insecure,
        **asdict(named),
    )
    format_logs(log_format, role="router")
    _run(serve_router(config))


@app.command()
@grouped
def worker(
    options: WorkerOptions,
    tiers: TierOptions,
    role: Annotated[Role, typer.Option(help="The pool to join.")],
    router: Annotated[
        list[str], typer.Option(help="A router's --control endpoint; may be given repeatedly.")
    ],
    model: Model = "demo",
    worker_id: Annotated[str | None, typer.Option(help="Default: host name and pid.")] = None,
    host: Annotated[
        str | None, typer.Option(help="This host's address for other workers. Default: found.")
    ] = None,
    control_port: Annotated[
        int, typer.Option(help="TCP port for other workers' messages; 0: any.", min=0, max=65535)
    ] = 0,
    data_port: Annotated[
        int, typer.Option(help="Port for other workers' KV; 0: any free one.", min=0, max=65535)
    ] = 0,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0: any free one.")] = 0,
    cluster_key_file: ClusterKey = None,
    log_format: LogFormat = "text",
) -> None:
    """Run one worker of either pool."""
    from cli.worker import WorkerConfig, serve_worker
    from engine.engine import EngineConfig
    from engine.tiers.config import TierConfig

    name = worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
    format_logs(log_format, role=role, worker_id=name)
    config = WorkerConfig(
        role=role,
        routers=tuple(router),
        worker_id=name,
        host=host,
        control_port=control_port,
        data_port=data_port,
        metrics_port=metrics_port,
        cluster_key_file=cluster_key_file,
        transport=options.transport,
        require_transport=options.require_transport,
        drain_timeout=options.drain_timeout,
        tiers=TierConfig(
            host_bytes=parse_size(tiers.kv_host_size) if tiers.kv_host_size else 0,
            disk_dir=tiers.kv_disk_dir,
            disk_bytes=parse_size(tiers.kv_disk_size),
        ),
        engine=EngineConfig(
            model=locate(model),
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            load_format=options.load_format,
            max_model_len=options.max_model_len,
            block_size=options.block_size,
            num_blocks=options.num_kv_blocks,
            kv_cache_memory=options.kv_cache_memory,
            # decode reads prefill's
            shared_kv=role == "prefill" and options.transport == "auto",
            wire_quantization=options.wire_quantization,
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            decode_graphs=role == "decode" and not options.enforce_eager,
            profile=options.profile / f"{name}.json.gz" if options.profile else None,
            profile_steps=options.profile_steps,
        ),
    )
    _run(serve_worker(config))


@app.command()
def keygen(path: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Make a key for the links of a cluster; copy the file to every host of it."""
    from protocol.link import write_cluster_key

    try:
        write_cluster_key(path)
    except ConfigError as error:
        _exit(error)


def main() -> None:
    """The ``kvferry`` command."""
    logging.basicConfig(
        level=os.environ.get("KVFERRY_LOG_LEVEL", "INFO").upper(),
        format=TEXT,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    app()


def _run(process: Coroutine[Any, Any, None]) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        asyncio.run(process)
    except* KvferryError as group:
        _exit(next(iter(_leaves(group))))
    finally:
        zmq.asyncio.Context.instance().term()  # removes the sockets' files


def _leaves(group: BaseExceptionGroup[KvferryError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _exit(error: BaseException) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(1)


def _api_keys(http: HttpOptions) -> tuple[str, ...]:
    return _keys(http.api_key, http.api_key_file)


def _admin_keys(http: HttpOptions) -> tuple[str, ...]:
    return _keys(http.admin_api_key, http.admin_api_key_file)


def _keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    from router.api_keys import read_api_keys

    try:
        return (*(given or ()), *(read_api_keys(path) if path else ()))
    except ConfigError as error:
        _exit(error)


def _arguments(**options: object) -> list[str]:
    """Options as command line arguments; those that are None or False keep their default."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
    return words


if __name__ == "__main__":
    main()
