"""Traces are read, distributions drawn, rates changed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from planner.workload import (
    Lengths,
    Request,
    at_rate,
    generate,
    prompt_lengths,
    rate_of,
    read_trace,
)
from protocol.errors import ConfigError

AZURE = "arrival_s,input_tokens,output_tokens\n0.0,374,44\n4.5,396,109\n6.0,10,0\n"
MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 8, "hash_ids": [0, 1]}\n'
    '{"timestamp": 27, "input_length": 700, "output_length": 9, "hash_ids": [0, 2]}\n'
)


def trace(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azures_columns(tmp_path: Path) -> None:
    assert read_trace(trace(tmp_path, AZURE)) == [
        Request(0.0, 374, 44),
        Request(4.5, 396, 109),
        Request(6.0, 10, 1),
    ]


def test_mooncakes_lines(tmp_path: Path) -> None:
    first, second = read_trace(trace(tmp_path, MOONCAKE))
    assert first == Request(0.0, 600, 8, (0, 1))
    assert second == Request(0.027, 700, 9, (0, 2))


def test_coarse_times_are_spread_within_their_cells(tmp_path: Path) -> None:
    line = '{{"timestamp": {}, "input_length": 6, "output_length": 8, "hash_ids": []}}'
    times = [3000 * (n // 100) - (n in (100, 200)) for n in range(300)]  # some a little early
    text = "\n".join(map(line.format, times))
    arrivals = [request.arrival for request in read_trace(trace(tmp_path, text))]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) == 300
    assert [sum(-0.001 <= a - 3 * n < 2.999 for a in arrivals) for n in range(3)] == [100] * 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "expected the columns arrival_s"),
        (AZURE + "7.0,many,3\n", "line 5: .*many"),
        (AZURE + "inf,3,3\n", "line 5: a finite time"),
        (AZURE + "7.0,0,3\n", "line 5: .* a prompt"),
        (MOONCAKE + "{\n", "line 3"),
        (MOONCAKE + '{"timestamp": 0}\n', "line 3: .*input_length"),
        ("arrival_s,input_tokens,output_tokens\n0.0,3,3\n", "two requests at different times"),
    ],
)
def test_a_broken_trace_is_refused_by_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_trace(trace(tmp_path, text))


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_generated_gaps_and_lengths_have_their_moments(burstiness: float) -> None:
    drawn = list(
        generate(
            rate=4,
            count=20_000,
            prompt=Lengths(1000, 1.0),
            output=Lengths(50),
            burstiness=burstiness,
        )
    )
    gaps = np.array([after.arrival - before.arrival for before, after in pairwise(drawn)])
    prompts = np.array([request.prompt_tokens for request in drawn])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.08)
    assert prompts.mean() == pytest.approx(1000, rel=0.05)
    assert prompts.std() / prompts.mean() == pytest.approx(1.0, rel=0.1)
    assert {request.output_tokens for request in drawn} == {50}


def test_prompts_by_quarters() -> None:
    lengths = [400, 100, 300, 200, 500]
    requests = [Request(0.0, length, 1) for length in lengths]
    assert prompt_lengths(requests) == [0, 200, 300, 400, 500]
    assert prompt_lengths([replace(requests[0], cached_tokens=390)]) == [0, 10]


def test_another_rate_keeps_the_bursts() -> None:
    requests = [Request(time, 1, 1) for time in (5.0, 5.0, 9.0, 10.0)]
    faster = list(at_rate(requests, 2 * rate_of(requests)))
    assert [request.arrival for request in faster] == [0.0, 0.0, 2.0, 2.5]
    assert rate_of(faster) == pytest.approx(2 * rate_of(requests))
