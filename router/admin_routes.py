"""Administration over HTTP: who is there, how it goes, where a request's time went."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from router.access import Access
from router.activity import SHORTEST, Objective
from router.autopilot_routes import autopilot_routes
from router.generation import Generator
from router.metrics import RouterMetrics
from router.pool_routes import pool_changes, pool_routes
from router.queries import number
from router.service_discovery import scrape_targets
from router.what_if_routes import Predictor, what_if_routes

DEFAULT_TTFT = 1.0  # seconds
DEFAULT_TPOT = 0.1
LIST_LIMIT = 50  # rows of each list, unless asked otherwise
MAX_LIST_LIMIT = 1000


def admin_routes(
    model: str, generator: Generator, metrics: RouterMetrics, predict: Predictor, access: Access
) -> APIRouter:
    """Everything under ``/admin``. Who may read is for the caller to guard."""
    routes = APIRouter(prefix="/admin")
    routes.include_router(what_if_routes(generator, metrics.workload, predict))
    routes.include_router(autopilot_routes(access))
    routes.include_router(pool_routes(generator))
    routes.include_router(pool_changes(generator), dependencies=[Depends(access.change)])

    @routes.get("/workers")
    async def workers() -> Response:
        return JSONResponse({"workers": generator.workers()})

    @routes.get("/queue")
    async def queue() -> Response:
        state = generator.queue()
        return JSONResponse({**state.row(), "requests": state.requests})

    @routes.get("/targets")
    async def targets() -> Response:
        return JSONResponse(scrape_targets(generator.workers()))

    @routes.get("/overview")
    async def overview(request: Request) -> Response:
        objective = Objective(
            number(request, "ttft", DEFAULT_TTFT, least=SHORTEST),
            number(request, "tpot", DEFAULT_TPOT, least=SHORTEST),
        )
        after = int(number(request, "after", 0, least=0))
        return JSONResponse(_overview(model, generator, metrics, objective, after))

    @routes.get("/requests")
    async def requests(request: Request) -> Response:
        limit = min(int(number(request, "limit", LIST_LIMIT, least=1)), MAX_LIST_LIMIT)
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
        "colocated": generator.colocated,
        "workers": generator.workers(),
        "stages": metrics.log.stages(),
        "queue": generator.queue().row(),
        "window": metrics.activity.present(objective, now),
        "history": metrics.activity.history(objective, after, now),
    }
