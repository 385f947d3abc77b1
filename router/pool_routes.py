"""``/admin/pools`` and who serves in them: how many, and changing it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import Request

from protocol.errors import ConfigError, InvalidRequestError
from protocol.messages import Role
from router.body import read_body
from router.disaggregation import Mode
from router.generation import Generator
from router.schema_base import Body

MAX_BODY = 4096  # bytes
BODY_TIMEOUT = 5.0  # seconds

Size = Annotated[int, Field(ge=0, le=1_000_000)]
B = TypeVar("B", bound=Body)


class PoolsBody(Body):
    """How many workers each pool is to have."""

    prefill: Size
    decode: Size


class DisaggregationBody(Body):
    """Who is to compute prompts; without ``local_prefill_tokens`` auto goes by measurements."""

    mode: Mode
    local_prefill_tokens: Size | None = None


class RoleBody(Body):
    """The role that a worker is to take."""

    role: Role


def pool_routes(generator: Generator) -> APIRouter:
    """What tells, for ``/admin``."""
    routes = APIRouter()

    @routes.get("/pools")
    async def pools() -> Response:
        return JSONResponse(generator.pools.present())

    @routes.get("/disaggregation")
    async def disaggregation() -> Response:
        return JSONResponse(generator.disaggregation())

    return routes


def pool_changes(generator: Generator) -> APIRouter:
    """What changes, for ``/admin``. A change goes on after its answer; ``/pools`` tells how far."""
    routes = APIRouter()

    @routes.post("/pools")
    async def resize(request: Request) -> Response:
        body = await _read(request, PoolsBody)
        generator.pools.resize(body.prefill, body.decode)
        return JSONResponse(generator.pools.present())

    @routes.post("/disaggregation")
    async def disaggregate(request: Request) -> Response:
        body = await _read(request, DisaggregationBody)
        try:
            generator.disaggregate(body.mode, body.local_prefill_tokens)
        except ConfigError as error:
            raise InvalidRequestError(str(error), "local_prefill_tokens") from error
        return JSONResponse(generator.disaggregation())

    @routes.post("/workers/{worker_id:path}/role")
    async def flip(worker_id: str, request: Request) -> Response:
        body = await _read(request, RoleBody)
        generator.pools.flip(worker_id, body.role)
        return JSONResponse(generator.pools.present())

    @routes.post("/workers/{worker_id:path}/drain")
    async def drain(worker_id: str) -> Response:
        return JSONResponse(generator.drain(worker_id))

    return routes


async def _read(request: Request, kind: type[B]) -> B:
    return await read_body(request, kind, max_bytes=MAX_BODY, seconds=BODY_TIMEOUT)
