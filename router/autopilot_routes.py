"""``/admin/autopilot``: what an autopilot beside this router decided, as it says itself.

The router keeps the last report for the console. It never asks for one, nor acts on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import AwareDatetime, ConfigDict, Field
from starlette.requests import Request

from router.access import Access
from router.body import read_body
from router.schema_base import Body

MAX_BODY = 1 << 18  # bytes
BODY_TIMEOUT = 5.0  # seconds

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[AwareDatetime, Field(strict=False)]  # JSON has no times of its own


class Reported(Body):
    """Fields of later autopilots are left out."""

    model_config = ConfigDict(extra="ignore")


class PoolsReport(Reported):
    """Numbers of workers, and the longest prompt that decode computes itself, if that is told."""

    prefill: Count
    decode: Count
    local_prefill_tokens: Count | None = None


class SloReport(Reported):
    """Deadlines in seconds, and the share of requests that should meet both."""

    ttft: Seconds
    tpot: Seconds
    attainment: Share


class DecisionReport(Reported):
    """Other pools and why; shares of requests within the SLO, ``outcome`` from ``judged`` on."""

    time: Moment
    present: PoolsReport
    wanted: PoolsReport
    reason: str
    done: bool
    error: str | None = None  # why it was not done
    predicted: Share | None = None
    outcome: Share | None = None
    judged: Moment | None = None


class AutopilotReport(Reported):
    """All that is shown of an autopilot; another report comes every ``interval`` seconds."""

    mode: Literal["dry-run", "on"]
    slo: SloReport
    interval: Seconds
    decisions: list[DecisionReport]  # the newest first


@dataclass(slots=True)
class _Last:
    report: AutopilotReport | None = None
    came: float = 0.0

    def told(self) -> dict[str, Any] | None:
        if self.report is None:
            return None
        return {**self.report.model_dump(mode="json"), "age": time.monotonic() - self.came}


def autopilot_routes(access: Access) -> APIRouter:
    """For ``/admin``. A report stands in the operator's console: it needs the right to change."""
    routes = APIRouter()
    last = _Last()

    @routes.get("/autopilot")
    async def autopilot() -> Response:
        return JSONResponse({"autopilot": last.told()})

    @routes.put("/autopilot", dependencies=[Depends(access.change)])
    async def report(request: Request) -> Response:
        kind = AutopilotReport
        last.report = await read_body(request, kind, max_bytes=MAX_BODY, seconds=BODY_TIMEOUT)
        last.came = time.monotonic()
        return JSONResponse({"autopilot": last.told()})

    return routes
