"""What an autopilot reports to its router."""

from __future__ import annotations

from typing import Any

import httpx

from tests.router.conftest import PATIENCE, Router

DECISION: dict[str, Any] = {
    "time": "2026-03-01T12:00:00.250+00:00",
    "present": {"prefill": 1, "decode": 2, "local_prefill_tokens": None},
    "wanted": {"prefill": 2, "decode": 1},
    "reason": "deadlines are being missed",
    "done": True,
    "predicted": 0.99,
    "outcome": None,
}
REPORT: dict[str, Any] = {
    "mode": "on",
    "slo": {"ttft": 0.3, "tpot": 0.02, "attainment": 0.9},
    "interval": 5.0,
    "decisions": [DECISION],
}


def send(router: Router, report: object, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{router.url}/admin/autopilot"
    return httpx.put(url, json=report, headers=headers, timeout=PATIENCE)
