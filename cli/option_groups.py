"""Options that more than one command takes as a whole, in groups.

A command has a parameter for each group; ``grouped`` shows the command line their options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from cli.options import (
    ApiKey,
    BlockSize,
    Device,
    Dtype,
    EnforceEager,
    Quantization,
    WireQuantization,
)
from cli.sizes import checked_size


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where the router listens, and who may come in."""

    host: Annotated[str, typer.Option(help="Address for HTTP.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port for HTTP.", min=1, max=65535)] = 8000
    api_key: ApiKey = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with such tokens, one a line, readable by its owner only."),
    ] = None
    admin_api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="KVFERRY_ADMIN_API_KEY",
            help="Bearer token for /admin and the console's figures; may be given repeatedly.",
        ),
    ] = None
    admin_api_key_file: Annotated[
        Path | None, typer.Option(help="File with such tokens, as --api-key-file.")
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen for other hosts without any API key.")
    ] = False


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """What the router does with requests."""

    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API. Default: --model.")
    ] = None
    tool_call_parser: Annotated[
        Literal["auto", "none", "hermes", "llama3_json", "mistral"],
        typer.Option(help="How the model writes tool calls. auto: as its chat template says."),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none", "think"],
        typer.Option(
            help="think: text in <think> is reasoning_content. auto: if the template has it."
        ),
    ] = "auto"
    request_timeout: Annotated[float, typer.Option(help="Seconds a request may take.", min=1)] = (
        600.0
    )
    max_num_requests: Annotated[
        int, typer.Option(help="Requests, waiting ones included, before a 429.", min=1)
    ] = 1024
    max_queue_time: Annotated[
        float,
        typer.Option(help="Seconds a request may wait for its turn before it gets a 429.", min=0),
    ] = 30.0
    max_retries: Annotated[
        int,
        typer.Option(
            help="Failures after which a request goes on elsewhere; the next ends it.", min=0
        ),
    ] = 3
    disaggregation: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Prompts go to prefill workers: always, never (decode workers compute them), or "
            "auto: all but short ones, and as long as there are prefill workers."
        ),
    ] = "auto"
    local_prefill_tokens: Annotated[
        int | None,
        typer.Option(help="Longest prompt that auto calls short. Default: as measured.", min=0),
    ] = None
    policy: Annotated[
        Literal["prefix-aware", "least-loaded", "power-of-two", "round-robin"],
        typer.Option(
            help="How workers are chosen. prefix-aware: by what they have cached, as far as their "
            "load allows."
        ),
    ] = "prefix-aware"
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="OpenTelemetry collector (OTLP over HTTP), as http://localhost:4318."),
    ] = None


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """A worker's model, memory, steps and transport."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = None
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: seeded random weights from the config.")
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt plus output, in tokens. Default: the model's."),
    ] = None
    block_size: BlockSize = None
    num_kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a worker; overrides the memory options.")
    ] = None
    kv_cache_memory: Annotated[float, typer.Option(help="KV memory of a CPU worker, in GiB.")] = 1.0
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", help="Share of a GPU's memory to use.")
    ] = 0.9
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Prompt tokens a worker computes in one step.", min=1)
    ] = 512
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences in a worker's running batch.", min=1)
    ] = 64
    enforce_eager: EnforceEager = False
    transport: Annotated[
        Literal["auto", "ucx"],
        typer.Option(
            help="How KV travels. auto: over mapped memory to peers on this host, else UCX."
        ),
    ] = "auto"
    wire_quantization: WireQuantization = "none"
    require_transport: Annotated[
        str | None,
        typer.Option(help="Refuse to start without a transport, for example rc_mlx5 or memory."),
    ] = None
    drain_timeout: Annotated[
        float,
        typer.Option(help="Seconds that a leaving worker takes to end its work; 0: none.", min=0),
    ] = 30.0
    profile: Annotated[
        Path | None,
        typer.Option(help="Folder where each worker writes a Chrome trace of some of its steps."),
    ] = None
    profile_steps: Annotated[int, typer.Option(help="Steps in that trace.", min=1)] = 20


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Where a worker keeps the KV blocks that its pool evicts."""

    kv_host_size: Annotated[
        str | None,
        typer.Option(
            callback=checked_size,
            help="Host memory in which a GPU worker keeps evicted blocks, as 64GiB.",
        ),
    ] = None
    kv_disk_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory where a worker keeps evicted blocks; they outlive it. "
            "kvferry serve gives each worker that computes prompts a folder in it.",
        ),
    ] = None
    kv_disk_size: Annotated[
        str, typer.Option(callback=checked_size, help="What one worker may use of it, as 10GiB.")
    ] = "10GiB"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of the groups among its parameters.

    Groups are the parameters whose types are dataclasses; all of their fields have defaults.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            options += _options(groups[name])
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def spread(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spread.__signature__ = Signature(options)  # type: ignore[attr-defined]
    spread.__annotations__ = {option.name: option.annotation for option in options}
    return spread


def _options(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
