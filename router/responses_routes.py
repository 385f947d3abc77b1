"""OpenAI's Responses API: create, stream, retrieve, cancel. It keeps no conversations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from protocol.errors import InvalidRequestError, KvferryError
from router.event_stream import EventStream, server_sent
from router.generation import Generator
from router.http_errors import INTERNAL_ERROR
from router.http_protocol import first_byte_at
from router.intake import Intake
from router.metrics import RouterMetrics
from router.output import Piece
from router.responses_body import ResponsesBody
from router.responses_items import Event
from router.responses_output import ResponseOutput, without_malformed
from router.responses_store import ResponseStore
from router.stream import Job, run, while_connected


def responses_routes(
    read: Callable[[Request, type[ResponsesBody]], Awaitable[ResponsesBody]],
    intake: Intake,
    generator: Generator,
    metrics: RouterMetrics,
) -> APIRouter:
    """``read`` reads and validates a request's body."""
    routes = APIRouter()
    store = ResponseStore()

    @routes.post("/v1/responses")
    async def create(request: Request) -> Response:
        body = await read(request, ResponsesBody)
        client: str = request.state.client
        job = await _job(intake, body, first_byte_at(request))
        job = job.asked_by(client, request.headers.get("traceparent", ""))
        pieces = run(job, generator, metrics)
        output = ResponseOutput(job.head, body, job.num_prompt_tokens)
        if body.background:
            work = _in_background(output, pieces, metrics)
            return JSONResponse(store.start(client, output, work))

        def keep() -> None:
            if body.store:
                store.keep(client, output.present())

        if body.stream:
            first = await while_connected(request.receive, anext(pieces))
            return EventStream(ResponseEvents(output, keep), first, pieces, metrics)
        await while_connected(request.receive, _push_all(output, pieces))
        keep()
        return JSONResponse(output.present())

    @routes.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        if request.query_params.get("stream", "false").lower() != "false":
            raise InvalidRequestError("a response that is over cannot be streamed", "stream")
        return _from_store(store.find(request.state.client, response_id))

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        return _from_store(store.cancel(request.state.client, response_id))

    return routes


class ResponseEvents:
    """Tells a response as the events of its stream, and keeps it when it is over."""

    def __init__(self, output: ResponseOutput, keep: Callable[[], None]) -> None:
        self._output = output
        self._keep = keep

    def begin(self) -> Sequence[bytes]:
        """That there is a response."""
        return _encoded(self._output.begin())

    def push(self, piece: Piece) -> Sequence[bytes]:
        """What the piece adds, and with the last one the response as a whole."""
        events = self._output.push(piece)
        if piece.finish_reason is not None:  # kept before the client knows
            self._keep()
        return _encoded(events)

    def end(self) -> Sequence[bytes]:
        """None: the last piece's events have told it."""
        return ()

    def fail(self, error: KvferryError) -> Sequence[bytes]:
        """The response as far as it came, with the error."""
        events = self._output.fail(error)
        self._keep()
        return _encoded(events)


async def _job(intake: Intake, body: ResponsesBody, received: float) -> Job:
    try:
        return await intake.chat(body.chat(), received)
    except InvalidRequestError as error:
        if error.param == "messages":  # the chat template's word
            error.param = "input"
        raise


async def _push_all(output: ResponseOutput, pieces: AsyncGenerator[Piece, None]) -> None:
    async with aclosing(pieces):
        whole = [piece async for piece in pieces]
    for piece in without_malformed(whole):
        output.push(piece)


async def _in_background(
    output: ResponseOutput, pieces: AsyncGenerator[Piece, None], metrics: RouterMetrics
) -> None:
    """As a stream whose events nobody reads: it is seen as far as it came."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                output.push(piece)
    except KvferryError as error:
        metrics.failed(error.status, error.code)
        output.fail(error)
    except Exception:  # a bug: who asks is told so; the event loop logs it
        metrics.failed(INTERNAL_ERROR.status, INTERNAL_ERROR.code)
        output.fail(INTERNAL_ERROR)
        raise


def _encoded(events: Sequence[Event]) -> list[bytes]:
    return [server_sent(event, event["type"]) for event in events]


def _from_store(content: bytes) -> Response:
    return Response(content, media_type="application/json")
