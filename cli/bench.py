"""``kvferry bench``: load on any OpenAI endpoint, and what its clients felt."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvloop
from rich.console import Console

from cli.options import ApiKey
from protocol.errors import ConfigError

app = typer.Typer(help="Benchmark any OpenAI endpoint: latency percentiles, goodput, the knee.")

LOAD, LENGTHS, SLO, REQUESTS, OUTPUT = "Load", "Lengths", "SLO", "Requests", "Output"
# Options that may hold secrets, or say nothing of what was measured.
UNRECORDED = ("url", "api_key", "extra_body", "output", "csv", "html")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="The endpoint's address.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Default: the first that the endpoint lists.")
    ] = None,
    api_key: ApiKey = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second. Default: the trace's own, else 1.",
            min=1e-6,
            rich_help_panel=LOAD,
        ),
    ] = None,
    arrival_cv: Annotated[
        float | None,
        typer.Option(
            help="Coefficient of variation of the gaps between arrivals: 0 constant, 1 Poisson, "
            "more in bursts (Gamma). Default: the trace's arrivals, else 1.",
            min=0,
            rich_help_panel=LOAD,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="A closed loop of so many at once, instead.", min=1, rich_help_panel=LOAD
        ),
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests.", min=2, rich_help_panel=LOAD)] = 200,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds of arrivals, instead.", min=0, rich_help_panel=LOAD),
    ] = None,
    warmup: Annotated[
        int, typer.Option(help="Requests before the clock counts.", min=0, rich_help_panel=LOAD)
    ] = 8,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="From --rate, find the highest rate that keeps the SLO.",
            rich_help_panel=LOAD,
        ),
    ] = False,
    sweep_tolerance: Annotated[
        float,
        typer.Option(
            help="Relative width at which the sweep ends.", min=0.01, rich_help_panel=LOAD
        ),
    ] = 0.1,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            help="512, 128-1024 (uniform), lognormal:MEAN:CV or sharegpt.", rich_help_panel=LENGTHS
        ),
    ] = "512",
    output_tokens: Annotated[
        str, typer.Option(help="In the same notation.", rich_help_panel=LENGTHS)
    ] = "128",
    prefix_groups: Annotated[
        int,
        typer.Option(
            help="Groups of requests whose prompts begin alike; 0: none do.",
            min=0,
            rich_help_panel=LENGTHS,
        ),
    ] = 0,
    prefix_share: Annotated[
        float,
        typer.Option(
            help="Share of each prompt common to its group.", min=0, max=1, rich_help_panel=LENGTHS
        ),
    ] = 0.5,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Arrivals and lengths from a trace in Mooncake's or Azure's format.",
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    length_divisor: Annotated[
        int, typer.Option(help="Divide a trace's lengths.", min=1, rich_help_panel=LENGTHS)
    ] = 1,
    max_len: Annotated[
        int | None,
        typer.Option(
            help="Cut prompts so that prompt and output fit in so many tokens.",
            min=2,
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of arrivals, lengths and prompts. The same seed finds its prompts in caches.",
            rich_help_panel=LENGTHS,
        ),
    ] = 0,
    slo_ttft: Annotated[
        float, typer.Option(help="Milliseconds to the first token.", min=0, rich_help_panel=SLO)
    ] = 1000.0,
    slo_tpot: Annotated[
        float, typer.Option(help="Milliseconds a later token.", min=0, rich_help_panel=SLO)
    ] = 100.0,
    slo_attainment: Annotated[
        float,
        typer.Option(
            help="Share of requests that must keep both.", min=0, max=1, rich_help_panel=SLO
        ),
    ] = 0.9,
    api: Annotated[
        Literal["completions", "chat"],
        typer.Option(
            help="completions sends token ids, chat sends words.", rich_help_panel=REQUESTS
        ),
    ] = "completions",
    token_range: Annotated[
        tuple[int, int],
        typer.Option(help="Token ids to draw from: low, high.", rich_help_panel=REQUESTS),
    ] = (300, 3000),
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Have outputs as long as asked; not all endpoints know the field.",
            rich_help_panel=REQUESTS,
        ),
    ] = True,
    extra_body: Annotated[
        str, typer.Option(help="JSON object of more fields.", rich_help_panel=REQUESTS)
    ] = "{}",
    request_timeout: Annotated[
        float, typer.Option(help="Seconds for a whole answer.", min=0.1, rich_help_panel=REQUESTS)
    ] = 600.0,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON with every request; compare reads it.", rich_help_panel=OUTPUT),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="One line for each request.", rich_help_panel=OUTPUT)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="A page with charts.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Put load on an OpenAI endpoint and tell its latencies, goodput and errors."""
    if context.invoked_subcommand is not None:
        return
    from bench.serving import report, session, terminal, workload
    from bench.serving.prompts import TokenIds
    from planner.outcome import Slo

    if concurrency is not None and (sweep or {rate, arrival_cv, duration} != {None}):
        raise typer.BadParameter("a closed loop has no --rate, --arrival-cv, --duration or --sweep")
    if not 0 <= token_range[0] < token_range[1]:
        raise typer.BadParameter("the high id must lie above the low one", param_hint="token-range")
    if rate is None and concurrency is None and (trace is None or sweep or duration is not None):
        rate = 1.0
    settings = {k: v for k, v in context.params.items() if k not in UNRECORDED}
    with _errors():
        config = session.BenchmarkConfig(
            url=url,
            model=model,
            api=api,
            api_key=api_key[0] if api_key else None,
            workload=workload.Workload(
                count=num_requests,
                rate=rate,
                variation=arrival_cv,
                prompt=workload.parse_lengths(prompt_tokens, workload.SHAREGPT_PROMPT),
                output=workload.parse_lengths(output_tokens, workload.SHAREGPT_OUTPUT),
                prefix_groups=prefix_groups,
                prefix_share=prefix_share,
                trace=trace,
                length_divisor=length_divisor,
                max_len=max_len,
                seed=seed,
            ),
            slo=Slo(slo_ttft / 1e3, slo_tpot / 1e3, slo_attainment),
            settings={name: _plain(value) for name, value in settings.items()},
            token_ids=TokenIds(*token_range),
            concurrency=concurrency,
            duration=duration,
            warmup=warmup,
            sweep=sweep_tolerance if sweep else None,
            timeout=request_timeout,
            ignore_eos=ignore_eos,
            extra=_json_object(extra_body),
        )
        _allow_many_connections()
        console = Console()
        record = uvloop.run(session.benchmark(config, console))
        terminal.show(console, record)
        if output is not None:
            record.save(output, report.figures(record))
        if csv is not None:
            csv.write_text(report.per_request_csv(record))
        if html is not None:
            html.write_text(report.html(record))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="What a run wrote by --output.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Two runs side by side, each figure with B over A and what chance alone makes of it."""
    from bench.serving import terminal
    from bench.serving.record import load

    with _errors():
        terminal.show_comparison(Console(), (a.name, b.name), load(a), load(b))


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError("--extra-body is no JSON object")
    return fields


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _allow_many_connections() -> None:
    """An open loop on a slow endpoint has more requests under way than the usual limit of files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _errors() -> Iterator[None]:
    """End the command with the reason, not with a traceback."""
    try:
        yield
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
