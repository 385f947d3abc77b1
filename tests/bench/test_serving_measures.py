"""kvferry bench: formulas, the knee, comparison, and what is written and read."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from bench.serving.compare import compare
from bench.serving.measures import measure, warnings
from bench.serving.record import ClientLoad, Record, Result, Run, load
from bench.serving.report import figures, html, per_request_csv
from bench.serving.svg import Chart, Mark, Series, ticks
from bench.serving.sweep import find_knee
from planner.outcome import Slo
from protocol.errors import ConfigError

SLO = Slo(ttft=0.2, tpot=0.05)
IDLE = ClientLoad(wall=10.0, cpu=0.5, stall_p99=0.001, stall_max=0.002)


def result(index: int, *times: float, sent: float = 0.0, error: str | None = None) -> Result:
    end = sent + (times[-1] if times else 0.01)
    return Result(index, sent, sent, end, 10, 4, len(times), times, error, error or "")


def record(*results: Result, rate: float | None = 2.0) -> Record:
    run = Run(rate, results, IDLE)
    return Record("http://x", "m", "2025-01-01T00:00:00", {"rate": rate}, SLO, (run,))


def test_figures_by_hand() -> None:
    results = (
        result(0, 0.1, 0.14, 0.18, 0.22),  # within both deadlines
        result(1, 0.3, 0.31, 0.32, 0.33, sent=1.0),  # late first token; the last ones catch up
        result(2, 0.1, 0.4, 0.5, 0.52, sent=2.0),  # tokens too slow
        result(3, 0.1, sent=4.0, error="cut"),
    )
    found = measure(Run(1.0, results, IDLE), SLO)
    assert found.duration == pytest.approx(4.1)
    assert (found.requests, found.completed, found.errors) == (4, 3, {"cut": 1})
    assert (found.prompt_tokens, found.output_tokens) == (30, 12)
    assert found.output_tokens_per_s == pytest.approx(12 / 4.1)
    assert found.goodput == pytest.approx(1 / 4.1)
    assert found.attainment == 0.25
    assert found.ttft.p50 == pytest.approx(0.1)
    assert found.ttft.mean == pytest.approx(0.5 / 3)
    assert found.tpot.max == pytest.approx(0.42 / 3)
    assert found.itl.max == pytest.approx(0.3)
    assert found.e2e.p50 == pytest.approx(0.33)
    # Due at 0.2, 0.25, 0.3, 0.35: all of the first; of the second the last alone; of the third
    # the first alone; of the one that failed, which should have had four, one.
    assert found.deadline_attainment == pytest.approx((4 + 1 + 1 + 1) / 16)


def test_percentiles_interpolate() -> None:
    results = tuple(result(index, float(index)) for index in range(101))
    found = measure(Run(1.0, results, IDLE), SLO)
    ttft = found.ttft
    assert (ttft.p50, ttft.p90, ttft.p95, ttft.p99) == (50, 90, 95, 99)
    four = measure(Run(1.0, results[:4], IDLE), SLO).ttft
    assert (four.p50, four.p90) == pytest.approx((1.5, 2.7))
    assert math.isnan(found.tpot.p50)  # single tokens have none
    assert found.goodput > 0  # and miss no deadline for it


def test_tokens_that_share_an_event_count_each() -> None:
    burst = replace(result(0, 0.1, 0.5), output_tokens=4)  # two and two
    found = measure(Run(1.0, (burst,), IDLE), SLO)
    assert found.tpot.p50 == pytest.approx(0.4 / 3)
    assert found.deadline_attainment == 0.5


def test_nothing_completed_is_told_and_not_raised() -> None:
    broken = record(result(0, error="connect"))
    row = json.loads(json.dumps(figures(broken), allow_nan=False))
    assert (row["completed"], row["goodput"], row["ttft"]["p50"]) == (0, 0, None)
    assert "nothing measured" in html(broken)


@pytest.mark.parametrize(
    ("load_of_client", "word"),
    [
        (replace(IDLE, cpu=9.0), "bottleneck"),
        (replace(IDLE, stall_p99=0.05), "event loop was more than 50 ms late"),
    ],
)
def test_a_slow_client_is_warned_of(load_of_client: ClientLoad, word: str) -> None:
    results = tuple(result(index, 0.1, 0.2, 0.3, 0.4) for index in range(200))
    fine = measure(Run(1.0, results, IDLE), SLO)
    assert warnings(fine, IDLE) == []
    assert word in " ".join(warnings(fine, load_of_client))
    late = tuple(replace(r, sent=r.sent + 0.03) for r in results)
    short = tuple(replace(r, output_tokens=2) for r in results)
    assert "50% of the tokens" in " ".join(warnings(measure(Run(1.0, short, IDLE), SLO), IDLE))
    assert "30 ms late" in " ".join(warnings(measure(Run(1.0, late, IDLE), SLO), IDLE))


@pytest.mark.parametrize(("capacity", "start"), [(7.3, 1.0), (7.3, 100.0), (7.3, 7.3), (0.9, 0.9)])
async def test_the_knee_is_found_from_either_side(capacity: float, start: float) -> None:
    asked: list[float] = []

    async def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= capacity

    knee = await find_knee(holds, start, 0.05)
    assert knee is not None
    assert knee <= capacity <= knee * 1.05
    assert len(asked) == len(set(asked)) <= 14


async def test_a_system_that_never_keeps_the_slo_has_no_knee() -> None:
    async def holds(rate: float) -> bool:
        return False

    assert await find_knee(holds, 1.0, 0.1) is None


async def test_a_system_without_bound_ends_the_search() -> None:
    async def holds(rate: float) -> bool:
        return True

    assert await find_knee(holds, 1.0, 0.1) == 1024


def many(scale: float, seed: int, count: int = 300) -> Record:
    random = Random(seed)
    rows = []
    for index in range(count):
        first, gap = random.uniform(0.1, 0.2) * scale, random.uniform(0.01, 0.02)
        rows.append(result(index, *(first + gap * i for i in range(4)), sent=index * 0.1))
    return record(*rows)


def test_comparison_tells_a_difference_from_noise() -> None:
    same = {row.name: row for row in compare(many(1.0, 1), many(1.0, 2))}
    slower = {row.name: row for row in compare(many(1.0, 1), many(1.3, 2))}
    assert not same["TTFT p50"].differs
    assert slower["TTFT p50"].differs
    assert slower["TTFT p50"].ratio == pytest.approx(1.3, rel=0.06)
    assert not slower["TPOT p50"].differs
    assert slower["TTFT p50"].low < slower["TTFT p50"].ratio < slower["TTFT p50"].high


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    whole = replace(many(1.0, 1, 5), knee=2.0)
    path = tmp_path / "a.json"
    whole.save(path, figures(whole))
    assert load(path) == whole
    assert json.loads(path.read_text())["figures"]["completed"] == 5


@pytest.mark.parametrize("text", ["", "{}", '{"runs": 3}', "[1]"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no record of kvferry bench"):
        load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.json")


def test_csv_has_a_line_for_each_request() -> None:
    text = per_request_csv(record(result(0, 0.1, 0.14), result(1, sent=1.0, error="cut")))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["error"] for row in rows] == ["", "cut"]
    assert (rows[0]["ttft_ms"], rows[0]["tpot_ms"], rows[0]["met_slo"]) == (
        "100.000",
        "40.000",
        "1",
    )
    assert (rows[1]["ttft_ms"], rows[1]["met_slo"]) == ("", "0")


def test_the_page_holds_its_data_and_reaches_for_nothing() -> None:
    one = replace(many(1.0, 1), model="<b>m</b></script>")
    runs = tuple(replace(one.runs[0], rate=rate) for rate in (1.0, 2.0, 1.5))
    page = html(replace(one, runs=runs, knee=1.5))
    data = re.search(r'id="figures">(.*?)</script>', page)
    assert data is not None
    assert json.loads(data[1]) == figures(replace(one, runs=runs, knee=1.5))
    assert page.count("<svg") == 8
    assert "<b>m" not in page
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert html(one).count("<svg") == 6


def test_a_chart_puts_points_where_they_belong() -> None:
    chart = Chart("t", "x", "y", [Series("a", [(0, 0), (10, 100)])], [Mark("m", x=5)], y_max=100)
    assert 'd="M56.0 220.0L506.0 26.0"' in chart.svg()
    assert 'd="M281.0 26V220.0"' in chart.svg()
    assert '<circle class="dot s0" cx="506.0" cy="26.0"' in chart.svg(), "few points are seen"
    curve = Series("b", [(float(x), float(x)) for x in range(100)])
    assert "<circle" not in Chart("t", "x", "y", [curve]).svg()


@pytest.mark.parametrize("maximum", [0.003, 0.1, 1, 3, 7, 60, 61, 999, 12345.6])
def test_ticks_are_few_and_reach_the_end(maximum: float) -> None:
    found = ticks(maximum)
    assert found[0] == 0
    assert found[-2] < maximum <= found[-1] * (1 + 1e-9)
    assert 3 <= len(found) <= 8
