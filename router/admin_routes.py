"""Administration over HTTP: who is there, how it goes, where a request's time went."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from protocol.errors import InvalidRequestError
from router.activity import SHORTEST, Objective
from router.generation import Generator
from router.metrics import RouterMetrics
from router.service_discovery import scrape_targets

DEFAULT_TTFT = 1.0  # seconds
DEFAULT_TPOT = 0.1
LIST_LIMIT = 50  # rows of each list, unless asked otherwise
MAX_LIST_LIMIT = 1000


def admin_routes(model: str, generator: Generator, metrics: RouterMetrics) -> APIRouter:
    """Everything under ``/admin``."""
    routes = APIRouter(prefix="/admin")

    @routes.get("/workers")
    async def workers() -> Response:
        return JSONResponse({"workers": generator.workers()})

    @routes.get("/targets")
    async def targets() -> Response:
        return JSONResponse(scrape_targets(generator.workers()))

    @routes.post("/workers/{worker_id:path}/drain")
    async def drain(worker_id: str) -> Response:
        return JSONResponse(generator.drain(worker_id))

    @routes.get("/overview")
    async def overview(request: Request) -> Response:
        objective = Objective(
            _number(request, "ttft", DEFAULT_TTFT, least=SHORTEST),
            _number(request, "tpot", DEFAULT_TPOT, least=SHORTEST),
        )
        after = int(_number(request, "after", 0, least=0))
        return JSONResponse(_overview(model, generator, metrics, objective, after))

    @routes.get("/requests")
    async def requests(request: Request) -> Response:
        limit = min(int(_number(request, "limit", LIST_LIMIT, least=1)), MAX_LIST_LIMIT)
        now = time.monotonic()
        lists = {
            "running": metrics.log.running(limit),
            "recent": metrics.log.recent(limit),
            "slow": metrics.log.slowest(limit, now),
        }
        return JSONResponse(
            {name: [record.row(now) for record in records] for name, records in lists.items()}
        )

    @routes.get("/requests/{request_id}")
    async def one_request(request_id: str) -> Response:
        now = time.monotonic()
        records = metrics.log.find(request_id)
        sequences = [{**r.row(now), **r.timeline.details(now)} for r in records]
        return JSONResponse({"id": records[0].request_id, "sequences": sequences})

    return routes


def _overview(
    model: str, generator: Generator, metrics: RouterMetrics, objective: Objective, after: int
) -> dict[str, Any]:
    now = time.monotonic()
    return {
        "model": model,
        "not_ready_reason": generator.not_ready_reason(),
        "workers": generator.workers(),
        "stages": metrics.log.stages(),
        "window": metrics.activity.present(objective, now),
        "history": metrics.activity.history(objective, after, now),
    }


def _number(request: Request, name: str, default: float, *, least: float) -> float:
    """A finite number of the query. Raises InvalidRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise InvalidRequestError(f"{name} is {text!r}, not a number of at least {least:g}", name)
    return number
