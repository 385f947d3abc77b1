"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.sizes import checked_size
from protocol import logs

Model = Annotated[
    str, typer.Option(help="A local directory, a hub id, or demo: the bundled model.")
]
LogFormat = Annotated[
    logs.LogFormat,
    typer.Option(envvar="KVFERRY_LOG_FORMAT", help="How lines are logged; json: one object each."),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(help="OpenTelemetry collector (OTLP over HTTP), as http://localhost:4318."),
]
Host = Annotated[str, typer.Option(help="Address for HTTP.")]
Port = Annotated[int, typer.Option(help="Port for HTTP.", min=1, max=65535)]
ServedName = Annotated[
    str | None, typer.Option(help="The model's name in the API. Default: --model.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="KVFERRY_API_KEY",
        help="Bearer token that lets a client in; may be given repeatedly.",
    ),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with such tokens, one a line, readable by its owner only.")
]
AdminApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="KVFERRY_ADMIN_API_KEY",
        help="Bearer token for /admin and the console's figures; may be given repeatedly.",
    ),
]
AdminApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with such tokens, as --api-key-file.")
]
OperatorKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar=["KVFERRY_ADMIN_API_KEY", "KVFERRY_API_KEY"],
        help="The router's admin key, or an API key where it has none and nothing is changed.",
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen for other hosts without any API key.")
]
ToolCallParser = Annotated[
    Literal["auto", "none", "hermes", "llama3_json", "mistral"],
    typer.Option(help="How the model writes tool calls. auto: as its chat template says."),
]
ReasoningParser = Annotated[
    Literal["auto", "none", "think"],
    typer.Option(help="think: text in <think> is reasoning_content. auto: if the template has it."),
]
RequestTimeout = Annotated[float, typer.Option(help="Seconds a request may take.", min=1)]
MaxNumRequests = Annotated[
    int, typer.Option(help="Requests, waiting ones included, before a 429.", min=1)
]
MaxQueueTime = Annotated[
    float,
    typer.Option(help="Seconds a request may wait for its turn before it gets a 429.", min=0),
]
MaxRetries = Annotated[
    int,
    typer.Option(help="Failures after which a request goes on elsewhere; the next ends it.", min=0),
]
Disaggregation = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(
        help="Prompts go to prefill workers: always, never (decode workers compute them), or auto: "
        "all but short ones, and as long as there are prefill workers."
    ),
]
LocalPrefillTokens = Annotated[
    int | None,
    typer.Option(help="Longest prompt that auto calls short. Default: as measured.", min=0),
]
Policy = Annotated[
    Literal["prefix-aware", "least-loaded", "power-of-two", "round-robin"],
    typer.Option(
        help="How workers are chosen. prefix-aware: by what they have cached, as far as their load "
        "allows."
    ),
]
DrainTimeout = Annotated[
    float,
    typer.Option(help="Seconds that a leaving worker takes to end its work; 0: none.", min=0),
]
ClusterKey = Annotated[
    Path | None,
    typer.Option(help="File with the cluster's key, for links between hosts (kvferry keygen)."),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="Type of weights and KV.")
]
Quantization = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Compute linear layers in 8 bits, on a CPU. Default: in --dtype."),
]
Format = Annotated[
    Literal["auto", "dummy"], typer.Option(help="dummy: seeded random weights from the config.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest prompt plus output, in tokens. Default: the model's.")
]
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens in a KV block. Default: 64 on CUDA, 16 on a CPU.")
]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="KV blocks of a worker; overrides the memory options.")
]
KVCacheMemory = Annotated[float, typer.Option(help="KV memory of a CPU worker, in GiB.")]
KVHostSize = Annotated[
    str | None,
    typer.Option(
        callback=checked_size,
        help="Host memory in which a GPU worker keeps evicted blocks, as 64GiB.",
    ),
]
KVDiskDir = Annotated[
    Path | None,
    typer.Option(
        help="Directory where a worker keeps evicted blocks; they outlive it. "
        "kvferry serve gives each worker that computes prompts a folder in it.",
    ),
]
KVDiskSize = Annotated[
    str, typer.Option(callback=checked_size, help="What one worker may use of it, as 10GiB.")
]
GpuUtilization = Annotated[
    float, typer.Option("--gpu-memory-utilization", help="Share of a GPU's memory to use.")
]
MaxBatchedTokens = Annotated[
    int, typer.Option(help="Prompt tokens a worker computes in one step.", min=1)
]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences in a worker's running batch.", min=1)]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="On a GPU, launch decode steps without CUDA graphs.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")]
Transport = Annotated[
    Literal["auto", "ucx"],
    typer.Option(help="How KV travels. auto: over mapped memory to peers on this host, else UCX."),
]
WireQuantization = Annotated[
    Literal["none", "int8", "fp8"],
    typer.Option(
        help="KV travels in 8 bits: int8, or fp8 for keys beside int8 for values. Where peers map "
        "this host's memory it stays as it is. The same for all workers."
    ),
]
RequireTransport = Annotated[
    str | None,
    typer.Option(help="Refuse to start without a transport, for example rc_mlx5 or memory."),
]
Profile = Annotated[
    Path | None,
    typer.Option(help="Folder where each worker writes a Chrome trace of some of its steps."),
]
ProfileSteps = Annotated[int, typer.Option(help="Steps in that trace.", min=1)]
ThreadsPerWorker = Annotated[
    int | None,
    typer.Option(help="Threads of a CPU worker's engine. Default: its share of the cores.", min=1),
]
Pin = Annotated[
    bool | None,
    typer.Option("--pin/--no-pin", help="Keep each worker to its share. Default: if above 1 core."),
]

RouterUrl = Annotated[str, typer.Option(help="The router's HTTP address.")]
SloTtft = Annotated[float, typer.Option(help="Milliseconds to the first token.", min=0.001)]
SloTpot = Annotated[float, typer.Option(help="Milliseconds a later token.", min=0.001)]
Attainment = Annotated[
    float, typer.Option(help="Share of requests that must meet both.", min=0.01, max=1)
]
