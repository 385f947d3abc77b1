"""``/admin/workload``, ``/admin/latency-model`` and ``/admin/what-if``: what came, what a worker's
steps take, and what other pools would make of it.

The router only asks: the prediction is injected, since planner and router never import one
another, and is made in another process, since it computes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import Request

from router.body import read_body
from router.generation import Generator
from router.queries import number
from router.schema_base import Body
from router.workload_log import MAX_SECONDS, Observed, WorkloadLog

DEFAULT_SECONDS = 600.0
MAX_PREDICTED = 2000  # sequences that a prediction is given: it simulates no more
MAX_WORKERS = 256  # of a pool: a simulation holds a block pool for each
MAX_BODY = 4096  # bytes
BODY_TIMEOUT = 5.0  # seconds

Seconds = Annotated[float, Field(gt=0)]


class WhatIfBody(Body):
    """Pools to try at ``rate_factor`` times the measured rate; ``prefill`` 0: colocated workers."""

    prefill: Annotated[int, Field(ge=0, le=MAX_WORKERS)]
    decode: Annotated[int, Field(ge=1, le=MAX_WORKERS)]
    rate_factor: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    ttft: Seconds = 1.0
    tpot: Seconds = 0.1
    seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] = DEFAULT_SECONDS  # looked back


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, the sequences to ask it of, and the present workers' rows.

    Nothing asked: what the latency model is.
    """

    asked: WhatIfBody | None
    workload: list[Observed]
    workers: list[dict[str, Any]]
    local_prefill_tokens: int = 0  # the longest prompt that decode computes itself


# The answer's JSON. Raises InvalidRequestError when there is too little to go by, DeadlineError.
Predictor = Callable[[Question], Awaitable[dict[str, Any]]]


def what_if_routes(generator: Generator, log: WorkloadLog, predict: Predictor) -> APIRouter:
    """All of them, for ``/admin``."""
    routes = APIRouter()

    @routes.get("/workload")
    async def workload(request: Request) -> Response:
        seconds = min(number(request, "seconds", DEFAULT_SECONDS, least=1.0), MAX_SECONDS)
        rows = log.window(seconds, time.monotonic())
        return JSONResponse({"seconds": seconds, "columns": Observed._fields, "rows": rows})

    @routes.get("/latency-model")
    async def latency_model() -> Response:
        workload = log.window(DEFAULT_SECONDS, time.monotonic(), MAX_PREDICTED)
        return JSONResponse(await predict(Question(None, workload, generator.workers())))

    @routes.post("/what-if")
    async def what_if(request: Request) -> Response:
        body = await read_body(request, WhatIfBody, max_bytes=MAX_BODY, seconds=BODY_TIMEOUT)
        workload = log.window(body.seconds, time.monotonic(), MAX_PREDICTED)
        local: int = generator.disaggregation()["longest_local_prompt"]
        question = Question(body, workload, generator.workers(), local)
        return JSONResponse(await predict(question))

    return routes
