"""The command line: reads options once into one frozen config and starts the process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import zmq.asyncio
from prometheus_client import disable_created_metrics
from rich.console import Console

from cli import advise, autopilot, bench, plan, pools, profile
from cli.options import (
    AdminApiKey,
    AdminApiKeyFile,
    ApiKey,
    ApiKeyFile,
    BlockSize,
    ClusterKey,
    Device,
    Disaggregation,
    DrainTimeout,
    Dtype,
    EnforceEager,
    Format,
    GpuUtilization,
    Host,
    Insecure,
    KVCacheMemory,
    KVDiskDir,
    KVDiskSize,
    KVHostSize,
    LocalPrefillTokens,
    LogFormat,
    MaxBatchedTokens,
    MaxModelLen,
    MaxNumRequests,
    MaxNumSeqs,
    MaxQueueTime,
    MaxRetries,
    Model,
    NumKVBlocks,
    OtlpEndpoint,
    Pin,
    Policy,
    Port,
    Profile,
    ProfileSteps,
    Quantization,
    ReasoningParser,
    RequestTimeout,
    RequireTransport,
    ServedName,
    ThreadsPerWorker,
    ToolCallParser,
    Transport,
    WireQuantization,
)
from cli.sizes import parse_size
from protocol.errors import ConfigError, KvferryError
from protocol.logs import TEXT, format_logs
from protocol.messages import Role

DEMO_MODEL = Path(__file__).parent / "demo_model"

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
def serve(
    model: Model = "demo",
    prefill: Annotated[
        int, typer.Option(help="Prefill workers; 0: decode workers compute prompts too.", min=0)
    ] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.", min=1)] = 1,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: ServedName = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    admin_api_key: AdminApiKey = None,
    admin_api_key_file: AdminApiKeyFile = None,
    insecure: Insecure = False,
    tool_call_parser: ToolCallParser = "auto",
    reasoning_parser: ReasoningParser = "auto",
    request_timeout: RequestTimeout = 600.0,
    max_num_requests: MaxNumRequests = 1024,
    max_queue_time: MaxQueueTime = 30.0,
    max_retries: MaxRetries = 3,
    disaggregation: Disaggregation = "auto",
    local_prefill_tokens: LocalPrefillTokens = None,
    policy: Policy = "prefix-aware",
    otlp_endpoint: OtlpEndpoint = None,
    log_format: LogFormat = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    load_format: Format = "auto",
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = None,
    num_kv_blocks: NumKVBlocks = None,
    kv_cache_memory: KVCacheMemory = 1.0,
    kv_host_size: KVHostSize = None,
    kv_disk_dir: KVDiskDir = None,
    kv_disk_size: KVDiskSize = "10GiB",
    gpu_memory_utilization: GpuUtilization = 0.9,
    max_num_batched_tokens: MaxBatchedTokens = 512,
    max_num_seqs: MaxNumSeqs = 64,
    enforce_eager: EnforceEager = False,
    transport: Transport = "auto",
    wire_quantization: WireQuantization = "none",
    require_transport: RequireTransport = None,
    drain_timeout: DrainTimeout = 30.0,
    threads_per_worker: ThreadsPerWorker = None,
    pin: Pin = None,
    profile: Profile = None,
    profile_steps: ProfileSteps = 20,
) -> None:
    """Run a router and its workers as separate processes on this host."""
    from cli.serve import ServeConfig, serve

    keys = _api_keys(api_key, api_key_file)
    admin_keys = _api_keys(admin_api_key, admin_api_key_file)
    os.environ["KVFERRY_API_KEY"] = " ".join(keys)  # not on the router's command line
    os.environ["KVFERRY_ADMIN_API_KEY"] = " ".join(admin_keys)
    name = served_model_name or _default_name(model)
    config = ServeConfig(
        model=_checkpoint(model),
        num_prefill=prefill,
        num_decode=decode,
        host=host,
        port=port,
        api_key=keys[0] if keys else None,
        admin_key=admin_keys[0] if admin_keys else None,
        disaggregation=disaggregation,
        log_format=log_format,
        threads_per_worker=threads_per_worker,
        pin=pin,
        router_args=_arguments(
            served_model_name=name,
            request_timeout=request_timeout,
            max_num_requests=max_num_requests,
            max_queue_time=max_queue_time,
            max_retries=max_retries,
            disaggregation=disaggregation,
            local_prefill_tokens=local_prefill_tokens,
            policy=policy,
            otlp_endpoint=otlp_endpoint,
            insecure=insecure,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
        ),
        worker_args=_arguments(
            device=device,
            dtype=dtype,
            quantization=quantization,
            load_format=load_format,
            max_model_len=max_model_len,
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
            transport=transport,
            wire_quantization=wire_quantization,
            require_transport=require_transport,
            drain_timeout=drain_timeout,
            profile=profile,
            profile_steps=profile_steps,
        ),
        tier_args=_arguments(
            kv_host_size=kv_host_size, kv_disk_size=kv_disk_size if kv_disk_dir else None
        ),
        kv_disk_dir=kv_disk_dir,
    )
    _run(serve(config, Console()))


@app.command()
def router(
    model: Model = "demo",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    control: Annotated[
        str, typer.Option(help="Endpoint for the workers: tcp://HOST:PORT or ipc://PATH.")
    ] = "tcp://127.0.0.1:8100",
    served_model_name: ServedName = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    admin_api_key: AdminApiKey = None,
    admin_api_key_file: AdminApiKeyFile = None,
    insecure: Insecure = False,
    tool_call_parser: ToolCallParser = "auto",
    reasoning_parser: ReasoningParser = "auto",
    request_timeout: RequestTimeout = 600.0,
    max_num_requests: MaxNumRequests = 1024,
    max_queue_time: MaxQueueTime = 30.0,
    max_retries: MaxRetries = 3,
    disaggregation: Disaggregation = "auto",
    local_prefill_tokens: LocalPrefillTokens = None,
    policy: Policy = "prefix-aware",
    otlp_endpoint: OtlpEndpoint = None,
    log_format: LogFormat = "text",
    cluster_key_file: ClusterKey = None,
) -> None:
    """Run the router alone. Needs the model's tokenizer, not its weights."""
    from cli.router import RouterConfig, serve_router

    config = RouterConfig(
        model=_checkpoint(model),
        served_model_name=served_model_name or _default_name(model),
        host=host,
        port=port,
        control=control,
        cluster_key_file=cluster_key_file,
        api_keys=_api_keys(api_key, api_key_file),
        admin_keys=_api_keys(admin_api_key, admin_api_key_file),
        insecure=insecure,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        request_timeout=request_timeout,
        max_num_requests=max_num_requests,
        max_queue_time=max_queue_time,
        max_retries=max_retries,
        disaggregation=disaggregation,
        local_prefill_tokens=local_prefill_tokens,
        policy=policy,
        otlp_endpoint=otlp_endpoint,
    )
    format_logs(log_format, role="router")
    _run(serve_router(config))


@app.command()
def worker(
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    load_format: Format = "auto",
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = None,
    num_kv_blocks: NumKVBlocks = None,
    kv_cache_memory: KVCacheMemory = 1.0,
    kv_host_size: KVHostSize = None,
    kv_disk_dir: KVDiskDir = None,
    kv_disk_size: KVDiskSize = "10GiB",
    gpu_memory_utilization: GpuUtilization = 0.9,
    max_num_batched_tokens: MaxBatchedTokens = 512,
    max_num_seqs: MaxNumSeqs = 64,
    enforce_eager: EnforceEager = False,
    transport: Transport = "auto",
    wire_quantization: WireQuantization = "none",
    require_transport: RequireTransport = None,
    drain_timeout: DrainTimeout = 30.0,
    profile: Profile = None,
    profile_steps: ProfileSteps = 20,
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
        transport=transport,
        require_transport=require_transport,
        drain_timeout=drain_timeout,
        tiers=TierConfig(
            host_bytes=parse_size(kv_host_size) if kv_host_size else 0,
            disk_dir=kv_disk_dir,
            disk_bytes=parse_size(kv_disk_size),
        ),
        engine=EngineConfig(
            model=_checkpoint(model),
            device=device,
            dtype=dtype,
            quantization=quantization,
            load_format=load_format,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_kv_blocks,
            kv_cache_memory=kv_cache_memory,
            shared_kv=role == "prefill" and transport == "auto",  # decode reads prefill's
            wire_quantization=wire_quantization,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            decode_graphs=role == "decode" and not enforce_eager,
            profile=profile / f"{name}.json.gz" if profile else None,
            profile_steps=profile_steps,
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


def _api_keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    from router.api_keys import read_api_keys

    try:
        return (*(given or ()), *(read_api_keys(path) if path else ()))
    except ConfigError as error:
        _exit(error)


def _default_name(model: str) -> str:
    return "kvferry-demo" if model == "demo" else model


def _checkpoint(model: str) -> str:
    return str(DEMO_MODEL) if model == "demo" else model


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
