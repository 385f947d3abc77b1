"""The API's own description, ``/openapi.json``, from the same schemas that validate bodies."""

from __future__ import annotations

from string import Formatter
from typing import Any

from pydantic.json_schema import models_json_schema

from router.activity import SHORTEST
from router.pool_routes import PoolsBody, RoleBody
from router.responses_body import ResponsesBody
from router.schema_base import Body
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from router.what_if_routes import WhatIfBody

VERSION = "3.1.0"
REF = "#/components/schemas/{model}"

_BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionBody, "Continue a prompt"),
    "/v1/chat/completions": (ChatBody, "Answer a chat"),
    "/v1/responses": (ResponsesBody, "Answer an input, in items"),
    "/tokenize": (TokenizeBody, "The token ids of a text or of a chat"),
    "/detokenize": (DetokenizeBody, "The text of token ids"),
    "/admin/what-if": (WhatIfBody, "Predict other pools under the present workload"),
    "/admin/pools": (PoolsBody, "Change how many workers serve in each pool"),
    "/admin/workers/{worker_id}/role": (RoleBody, "Let a worker serve in the other pool"),
}
_PAGES: dict[str, tuple[str, str | None]] = {  # what each says, and as what
    "/v1/models": ("The served model", "application/json"),
    "/v1/responses/{response_id}": ("A response that this router remembers", "application/json"),
    "/admin/workers": ("Every worker with its state and load", "application/json"),
    "/admin/overview": (
        "The last minute and ten minutes: latency, rates, goodput",
        "application/json",
    ),
    "/admin/requests": ("Sequences under way, recent and slow ones", "application/json"),
    "/admin/requests/{request_id}": ("Where one request's time went", "application/json"),
    "/admin/workload": ("When sequences came and how long they were", "application/json"),
    "/admin/pools": ("The sizes of both pools, and their last change", "application/json"),
    "/admin/targets": ("The workers' metrics, for Prometheus' http_sd", "application/json"),
    "/health": ("Whether this process is alive", None),
    "/ready": ("Whether a request can be served now; 503 says why not", "application/json"),
    "/metrics": ("Metrics for Prometheus", "text/plain"),
}
_QUERIES: dict[str, dict[str, float]] = {  # a page's numbers, and the least each may be
    "/admin/overview": {"ttft": SHORTEST, "tpot": SHORTEST, "after": 0},
    "/admin/requests": {"limit": 1},
    "/admin/workload": {"seconds": 1},
}
_ACTIONS: dict[str, str] = {  # without a body
    "/v1/responses/{response_id}/cancel": "End a response made in the background",
    "/admin/workers/{worker_id}/drain": "Let a worker end its work and leave",
}
_STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
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
                "parameters": [*map(_in_path, _names(path))],
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
        paths.setdefault(path, {})["get"] = operation
    for path, summary in _ACTIONS.items():
        paths[path] = {
            "post": {
                "summary": summary,
                "parameters": [*map(_in_path, _names(path))],
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
