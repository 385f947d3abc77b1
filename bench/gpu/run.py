"""Runs checks and cases. What fails is reported in its place; the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

import torch

from bench.gpu.case import Case, Check
from bench.gpu.report import Report, Row
from bench.gpu.timing import Timer

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the relative error, in the 2-norm
Progress = Callable[[str], None]


def run_checks(report: Report, checks: Iterable[Check], device: torch.device) -> bool:
    """Whether every kernel agrees with its twin."""
    passed = True
    for check in checks:
        for dtype, bound in BOUNDS.items():
            try:
                error = relative_error(*check.run(device, dtype))
            except Exception as failure:  # noqa: BLE001 (of any kernel, compiler or driver)
                outcome: float | str = brief(failure)
            else:
                outcome = error if error < bound else f"relative error {error:.1e}"
            passed &= not isinstance(outcome, str)
            report.checks[f"{check.name}, {dtype}".replace("torch.", "")] = outcome
    return passed


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite when the result is not finite everywhere."""
    if result.shape != expected.shape or not result.isfinite().all():
        return float("inf")
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def run_cases(
    report: Report, cases: Iterable[Case], timer: Timer, seconds: float, progress: Progress
) -> None:
    """Our own times first, then the peers', until ``seconds`` are over."""
    deadline = monotonic() + seconds
    report.ceilings = timer.ceilings()
    rows = [(case, Row(case.name, case.ceiling, case.goal)) for case in cases]
    for case, row in rows:
        report.rows.append(row)
        if monotonic() > deadline:
            row.error = "out of time"
        else:
            measure(timer, case, row, report.ceilings[case.ceiling])
        progress(case.name)
    for case, row in rows:
        if row.seconds is not None and monotonic() < deadline:
            measure_peers(timer, case, row, deadline)
            progress(f"{case.name}: peers")


def measure(timer: Timer, case: Case, row: Row, ceiling: float) -> None:
    try:
        torch.cuda.empty_cache()  # the case before is gone by now
        timed = case.prepare()
        row.seconds = timer.seconds(timed.ours, captured=timed.captured)
        row.rate = timed.work / row.seconds
        row.fraction = row.rate / ceiling
    except Exception as failure:  # noqa: BLE001 (of any kernel, compiler or driver)
        row.error = brief(failure)


def measure_peers(timer: Timer, case: Case, row: Row, deadline: float) -> None:
    assert row.seconds is not None
    try:
        torch.cuda.empty_cache()  # the case before is gone by now
        timed = case.prepare()
        peers = timed.peers()
    except Exception as failure:  # noqa: BLE001 (whatever a peer raises)
        row.peers["peers"] = brief(failure)
        return
    for name, peer in peers.items():
        if monotonic() > deadline:
            row.peers[name] = "out of time"
            continue
        try:
            row.peers[name] = timer.seconds(peer, captured=timed.captured) / row.seconds
        except Exception as failure:  # noqa: BLE001 (whatever a peer raises)
            row.peers[name] = brief(failure)


def brief(failure: Exception) -> str:
    """One line."""
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0][:120] if text else ''}"
