"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from protocol import logs

Model = Annotated[
    str, typer.Option(help="A local directory, a hub id, or demo: the bundled model.")
]
LogFormat = Annotated[
    logs.LogFormat,
    typer.Option(envvar="KVFERRY_LOG_FORMAT", help="How lines are logged; json: one object each."),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="KVFERRY_API_KEY",
        help="Bearer token that lets a client in; may be given repeatedly.",
    ),
]
OperatorKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar=["KVFERRY_ADMIN_API_KEY", "KVFERRY_API_KEY"],
        help="The router's admin key, or an API key where it has none and nothing is changed.",
    ),
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
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens in a KV block. Default: 64 on CUDA, 16 on a CPU.")
]
WireQuantization = Annotated[
    Literal["none", "int8", "fp8"],
    typer.Option(
        help="KV travels in 8 bits: int8, or fp8 for keys beside int8 for values. Where peers map "
        "this host's memory it stays as it is. The same for all workers."
    ),
]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="On a GPU, launch decode steps without CUDA graphs.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")]
RouterUrl = Annotated[str, typer.Option(help="The router's HTTP address.")]
SloTtft = Annotated[float, typer.Option(help="Milliseconds to the first token.", min=0.001)]
SloTpot = Annotated[float, typer.Option(help="Milliseconds a later token.", min=0.001)]
Attainment = Annotated[
    float, typer.Option(help="Share of requests that must meet both.", min=0.01, max=1)
]
