"""The router's HTTP: OpenAI's API, vLLM's tokenizer routes, health, metrics.

Owns routes and the bounds on bodies. ``access`` guards, ``intake`` validates, ``stream`` answers,
``admin_routes`` and ``console_page`` serve the operator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request

from protocol.errors import InvalidRequestError
from router import http_errors
from router.access import Access
from router.admin_routes import admin_routes
from router.api_keys import ApiKeys
from router.body import read_body
from router.chunks import Chunks
from router.console_page import console_routes
from router.event_stream import EventStream
from router.generation import Generator
from router.http_protocol import first_byte_at
from router.intake import Intake
from router.metrics import RouterMetrics
from router.openapi import description
from router.request_log import Record
from router.responses_routes import responses_routes
from router.schema_base import Body
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from router.stream import Job, run, while_connected, whole_answer
from router.text import TextModel
from router.what_if_routes import Predictor

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What the HTTP half is told at start."""

    served_model_name: str
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    admin_keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 4 << 20
    body_timeout: float = 60.0  # seconds until a body must have arrived


def create_app(
    settings: RouterSettings,
    text: TextModel,
    generator: Generator,
    registry: CollectorRegistry,
    predict: Predictor,
    on_end: Callable[[Record], None] | None = None,
) -> FastAPI:
    """The application. It keeps no state but ``registry``'s series and what the console shows.

    ``predict`` answers the console's "what if"; ``on_end`` is told of every sequence that is over.
    """
    metrics = RouterMetrics(registry, on_end)
    intake = Intake(settings.served_model_name, text, generator)
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    http_errors.install(app, metrics)
    access = Access(settings.api_keys, settings.admin_keys)
    guarded = [Depends(access.use)]
    app.include_router(_open_routes(generator, registry))
    app.include_router(console_routes())
    app.include_router(_api_routes(settings, intake, generator, metrics), dependencies=guarded)
    app.include_router(_token_routes(settings, intake, text, generator), dependencies=guarded)
    read = partial(_read, settings=settings)
    responses = responses_routes(read, intake, generator, metrics)
    app.include_router(responses, dependencies=guarded)
    admin = admin_routes(settings.served_model_name, generator, metrics, predict, access)
    app.include_router(admin, dependencies=[Depends(access.read)])
    return app


def _open_routes(generator: Generator, registry: CollectorRegistry) -> APIRouter:
    """What needs no key."""
    routes = APIRouter()
    document = description("kvferry")

    @routes.get("/health")
    async def health() -> Response:
        return Response()

    @routes.get("/ready")
    async def ready() -> Response:
        reason = generator.not_ready_reason()
        content = {"ready": reason is None, "reason": reason, "colocated": generator.colocated}
        return JSONResponse(content, 503 if reason else 200)

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    @routes.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    return routes


def _api_routes(
    settings: RouterSettings, intake: Intake, generator: Generator, metrics: RouterMetrics
) -> APIRouter:
    routes = APIRouter()
    started = int(time.time())

    async def answer(request: Request, job: Job) -> Response:
        job = job.asked_by(request.state.client, request.headers.get("traceparent", ""))
        pieces = run(job, generator, metrics)
        if not job.stream:
            content = await while_connected(request.receive, whole_answer(job, pieces))
            return JSONResponse(content)
        first = await while_connected(request.receive, anext(pieces))
        return EventStream(Chunks(job), first, pieces, metrics)

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionBody, settings)
        return await answer(request, await intake.completion(body, first_byte_at(request)))

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await _read(request, ChatBody, settings)
        return await answer(request, await intake.chat(body, first_byte_at(request)))

    @routes.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise InvalidRequestError("this server generates text only: it has no embeddings")

    def model() -> dict[str, Any]:
        return {
            "id": settings.served_model_name,
            "object": "model",
            "created": started,
            "owned_by": "kvferry",
            "max_model_len": generator.max_model_len,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        intake.check_model(name)
        return JSONResponse(model())

    return routes


def _token_routes(
    settings: RouterSettings, intake: Intake, text: TextModel, generator: Generator
) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        tokens = await intake.tokenize(await _read(request, TokenizeBody, settings))
        return JSONResponse(
            {"count": len(tokens), "max_model_len": generator.max_model_len, "tokens": tokens}
        )

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await _read(request, DetokenizeBody, settings)
        intake.check_model(body.model)
        text.check_token_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": text.decode(body.tokens)})

    return routes


async def _read(request: Request, kind: type[B], settings: RouterSettings) -> B:
    return await read_body(
        request, kind, max_bytes=settings.max_body_bytes, seconds=settings.body_timeout
    )
