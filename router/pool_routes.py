"""``/admin/pools`` and the roles of workers: how many serve in which pool, and changing it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import Request

from protocol.messages import Role
from router.body import read_body
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


class RoleBody(Body):
    """The role that a worker is to take."""

    role: Role


def pool_routes(generator: Generator) -> APIRouter:
    """All of them, for ``/admin``. A change goes on after its answer; ``/pools`` tells how far."""
    routes = APIRouter()

    @routes.get("/pools")
    async def pools() -> Response:
        return JSONResponse(generator.pools.present())

    @routes.post("/pools")
    async def resize(request: Request) -> Response:
        body = await _read(request, PoolsBody)
        generator.pools.resize(body.prefill, body.decode)
        return JSONResponse(generator.pools.present())

    @routes.post("/workers/{worker_id:path}/role")
    async def flip(worker_id: str, request: Request) -> Response:
        body = await _read(request, RoleBody)
        generator.pools.flip(worker_id, body.role)
        return JSONResponse(generator.pools.present())

    return routes


async def _read(request: Request, kind: type[B]) -> B:
    return await read_body(request, kind, max_bytes=MAX_BODY, seconds=BODY_TIMEOUT)
