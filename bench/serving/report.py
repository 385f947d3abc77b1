"""A record as one HTML page, self-contained, light and dark, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from bench.serving.measures import (
    Distribution,
    Floats,
    Measures,
    completed,
    e2es,
    itls,
    measure,
    meets,
    tpot,
    tpots,
    ttfts,
    warnings,
)
from bench.serving.record import Record, Run
from bench.serving.svg import Chart, Mark, Series

CURVE = 200  # points of a distribution's curve
BINS = 60  # of the charts over time

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #fff;
  --card: #f6f8fa; --s0: #0969da; --s1: #bf5b04; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --page: #0d1117; --card: #161b22; --s0: #58a6ff; --s1: #f0a04b;
  --bad: #ff8577; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } .bad { color: var(--bad); }
.cards, .charts { display: grid; gap: 1rem; margin-top: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.cards div, .charts svg { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.cards div { padding: .7rem 1rem; } .cards b { display: block; font-size: 1.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.axis, .grid, .mark, .line { fill: none; } .axis { stroke: var(--soft); }
.grid { stroke: var(--line); } .mark { stroke: var(--bad); stroke-dasharray: 5 4; }
.line { stroke-width: 2; stroke: var(--s0); } .dot { fill: var(--s0); fill-opacity: .75; }
.line.s1 { stroke: var(--s1); } .dot.s1 { fill: var(--s1); }
"""

CSV_COLUMNS = (
    "index,scheduled_s,sent_s,prompt_tokens,expected_tokens,output_tokens,"
    "ttft_ms,tpot_ms,e2e_ms,met_slo,error,message"
)


def figures(record: Record) -> dict[str, Any]:
    """The chosen run's measures as JSON; what was not measured is null. Times in seconds."""
    run = record.chosen
    measures = measure(run, record.slo)
    row = {"rate": run.rate, "knee": record.knee, **asdict(measures)}
    row["warnings"] = warnings(measures, run.client)
    plain: dict[str, Any] = _without_nan(row)
    return plain


def per_request_csv(record: Record) -> str:
    """One line for each request of the chosen run."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(CSV_COLUMNS.split(","))
    for r in record.chosen.results:
        times: tuple[str, ...] = ("", "", "")
        if r.error is None:
            seconds = (r.times[0], tpot(r), r.times[-1])
            times = tuple(f"{value * 1e3:.3f}" for value in seconds)
        sent = (f"{r.scheduled:.6f}", f"{r.sent:.6f}")
        counts = (r.prompt_tokens, r.expected_tokens, r.output_tokens)
        end = (int(meets(r, record.slo)), r.error or "", r.message)
        table.writerow((r.index, *sent, *counts, *times, *end))
    return text.getvalue()


def html(record: Record) -> str:
    """The page."""
    run = record.chosen
    measures = measure(run, record.slo)
    load = "closed loop" if run.rate is None else f"{run.rate:.3g} requests/s offered"
    bad = "".join(f'<p class="bad">{escape(text)}</p>' for text in warnings(measures, run.client))
    charts = "".join(chart.svg() for chart in [*_sweep_charts(record), *_charts(record, run)])
    settings = [(name, value) for name, value in record.settings.items() if value is not None]
    data = json.dumps(figures(record)).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(record.model)}: kvferry bench</title><style>{STYLE}</style></head><body>
<h1>{escape(record.model)}</h1>
<p class="soft">{escape(record.endpoint)}, {escape(record.started)}, {load}</p>{bad}
<div class="cards">{_cards(record, measures)}</div>
<div class="charts">{charts}</div>
<h2>Latency, milliseconds</h2>{_latency_table(measures)}
<h2>Errors</h2>{_table(("kind", "requests"), measures.errors.items())}
<h2>Client</h2>{_client_table(run)}
<h2>Settings</h2>{_table(("option", "value"), settings)}
<script type="application/json" id="figures">{data}</script>
</body></html>
"""


def _cards(record: Record, measures: Measures) -> str:
    slo = record.slo
    cards = [
        (f"{measures.completed}/{measures.requests}", "requests completed"),
        (f"{measures.goodput:.3g}/s", f"goodput: {slo.ttft * 1e3:g} / {slo.tpot * 1e3:g} ms"),
        (f"{measures.attainment:.1%}", "of requests within both deadlines"),
        (f"{measures.deadline_attainment:.1%}", "of tokens on time"),
        (f"{measures.output_tokens_per_s:.0f}/s", "output tokens"),
    ]
    if len(record.runs) > 1:
        knee = "none" if record.knee is None else f"{record.knee:.3g}/s"
        cards.insert(0, (knee, f"knee: highest rate with {slo.attainment:.0%} within"))
    return "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in cards)


def _latency_table(measures: Measures) -> str:
    named: list[tuple[str, Distribution]] = [
        ("TTFT", measures.ttft),
        ("TPOT", measures.tpot),
        ("ITL", measures.itl),
        ("E2E", measures.e2e),
        ("client lag", measures.lag),
    ]
    rows = [(name, *(_ms(value) for value in asdict(d).values())) for name, d in named]
    return _table(("", "mean", "p50", "p90", "p95", "p99", "max"), rows)


def _client_table(run: Run) -> str:
    load = run.client
    rows = [
        ("processor", f"{load.cpu / load.wall:.1%} of a core"),
        ("event loop late, p99", f"{_ms(load.stall_p99)} ms"),
        ("event loop late, max", f"{_ms(load.stall_max)} ms"),
    ]
    return _table(("of the load's own process", ""), rows)


def _charts(record: Record, run: Run) -> list[Chart]:
    done, slo = completed(run.results), record.slo
    sent = [(r.sent, r.times[0] * 1e3) for r in done]
    ends = np.array([r.sent + t for r in run.results for t in r.times])
    total = max(r.ended for r in run.results)
    width = total / BINS
    counts, edges = np.histogram(ends, bins=BINS, range=(0, total))
    moments = np.linspace(0, total, BINS + 1)
    starts = np.sort([r.sent for r in run.results])
    stops = np.sort([r.ended for r in run.results])
    running = np.searchsorted(starts, moments, "right") - np.searchsorted(stops, moments, "right")
    mark_ttft = Mark("SLO", x=slo.ttft * 1e3)
    mark_tpot = Mark("SLO", x=slo.tpot * 1e3)
    tokens = [Series("TPOT", _curve(tpots(done))), Series("ITL", _curve(itls(done)))]
    return [
        Chart("Time to first token", "ms", "share", [Series("", _curve(ttfts(done)))], [mark_ttft]),
        Chart("Time per output token", "ms", "share", tokens, [mark_tpot]),
        Chart("End to end", "ms", "share", [Series("", _curve(e2es(done)))]),
        Chart(
            "First token over the run",
            "sent, s",
            "ms",
            [Series("", sent, joined=False)],
            [Mark("SLO", y=slo.ttft * 1e3)],
        ),
        Chart(
            "Requests under way",
            "s",
            "requests",
            [Series("", [(float(x), float(y)) for x, y in zip(moments, running, strict=True)])],
        ),
        Chart(
            "Events with text",
            "s",
            "a second",
            [
                Series(
                    "",
                    [
                        (float(x + width / 2), float(n / width))
                        for x, n in zip(edges[:-1], counts, strict=True)
                    ],
                )
            ],
        ),
    ]


def _sweep_charts(record: Record) -> list[Chart]:
    if len(record.runs) < 2:
        return []
    points = sorted((run.rate or 0.0, measure(run, record.slo)) for run in record.runs)
    share = [(rate, 100 * m.attainment) for rate, m in points]
    tokens = [(rate, 100 * m.deadline_attainment) for rate, m in points]
    served = [(rate, m.requests_per_s) for rate, m in points]
    good = [(rate, m.goodput) for rate, m in points]
    knee = [Mark("knee", x=record.knee)]
    target = Mark("target", y=100 * record.slo.attainment)
    return [
        Chart(
            "Within the SLO",
            "offered, requests/s",
            "%",
            [Series("requests", share), Series("tokens", tokens)],
            [target, *knee],
            y_max=100,
        ),
        Chart(
            "Served",
            "offered, requests/s",
            "requests/s",
            [Series("completed", served), Series("goodput", good)],
            knee,
        ),
    ]


def _curve(values: Floats) -> list[tuple[float, float]]:
    """The share of values below x, at evenly spaced shares; milliseconds."""
    if not len(values):
        return []
    shares = np.linspace(0, 1, CURVE)
    return [
        (float(x) * 1e3, float(y)) for x, y in zip(np.quantile(values, shares), shares, strict=True)
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{_cells("th", heads)}</tr></thead>'
        f"<tbody>{lines or '<tr><td>none</td></tr>'}</tbody></table></div>"
    )


def _cells(tag: str, row: Sequence[object]) -> str:
    return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)


def _ms(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e3:.2f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
