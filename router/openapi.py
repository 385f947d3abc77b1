"""The API's own description, ``/openapi.json``, from the same schemas that validate bodies."""

from __future__ import annotations

from string import Formatter
from typing import Any

from pydantic.json_schema import models_json_schema

from router.activity import SHORTEST
from router.schema_base import Body
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

VERSION = "3.1.0"
REF = "#/components/schemas/{model}"

_BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionBody, "Continue a prompt"),
    "/v1/chat/completions": (ChatBody, "Answer a chat"),
    "/tokenize": (TokenizeBody, "The token ids of a text or of a chat"),
    "/detokenize": (DetokenizeBody, "The text of token ids"),
}
_PAGES: dict[str, tuple[str, str | None]] = {  # what each says, and as what
    "/v1/models": ("The served model", "application/json"),
    "/admin/workers": ("Every worker with its state and load", "application/json"),
    "/admin/overview": (
        "The last minute and ten minutes: latency, rates, goodput",
        "application/json",
    ),
    "/admin/requests": ("Sequences under way, recent and slow ones", "application/json"),
    "/admin/requests/{request_id}": ("Where one request's time went", "application/json"),
    "/admin/targets": ("The workers' metrics, for Prometheus' http_sd", "application/json"),
    "/health": ("Whether this process is alive", None),
    "/ready": ("Whether a request can be served now; 503 says why not", "application/json"),
    "/metrics": ("Metrics for Prometheus", "text/plain"),
}
_QUERIES: dict[str, dict[str, float]] = {  # a page's numbers, and the least each may be
    "/admin/overview": {"ttft": SHORTEST, "tpot": SHORTEST, "after": 0},
    "/admin/requests": {"limit": 1},
}
_DRAIN = "/admin/workers/{worker_id}/drain"
_STREAMS = ("/v1/completions", "/v1/chat/completions")
_OPEN = ("/health", "/ready", "/metrics")  # without a key
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def description(title: str) -> dict[str, Any]:
    """The document."""
    bodies = [(body, "validation") for body, _ in _BODIES.values()]
    refs, definitions = models_json_schema(bodies, ref_template=REF)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, (body, summary) in _BODIES.items():
        content: dict[str, Any] = {"application/json": {}}
        if path in _STREAMS:
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": refs[body, "validation"]}},
                },
                "responses": _responses(content),
            }
        }
    for path, (summary, kind) in _PAGES.items():
        operation: dict[str, Any] = {
            "summary": summary,
            "parameters": [*map(_in_path, _names(path)), *_in_query(_QUERIES.get(path, {}))],
            "responses": _responses({kind: {}} if kind else {}),
        }
        if path in _OPEN:
            operation["security"] = []
        paths[path] = {"get": operation}
    paths[_DRAIN] = {
        "post": {
            "summary": "Let a worker end its work and leave",
            "parameters": [*map(_in_path, _names(_DRAIN))],
            "responses": _responses({"application/json": {}}),
        }
    }
    return {
        "openapi": VERSION,
        "info": {"title": title, "version": "1"},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _names(path: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(path) if name]


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(numbers: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "schema": {"type": "number", "minimum": least}}
        for name, least in numbers.items()
    ]


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    return {
        "200": {"description": "The answer", "content": content},
        "default": {"description": "What went wrong", "content": error},
    }
