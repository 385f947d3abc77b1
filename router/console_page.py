"""The operator's console: static files, open to everybody. Its data under ``/admin`` is not."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def console_routes() -> APIRouter:
    """``/console/`` and the files it loads, read once."""
    routes = APIRouter()
    pages = {
        file.name: (file.read_bytes(), kind)
        for file in files("router").joinpath("console").iterdir()
        if (kind := _TYPES.get("." + file.name.rpartition(".")[2])) is not None
    }

    @routes.get("/console")
    async def without_slash() -> Response:
        return RedirectResponse("console/")  # relative: a proxy may have its own prefix

    def add(path: str, content: bytes, kind: str) -> None:
        async def page() -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

        routes.add_api_route(path, page, methods=["GET"])

    for name, (content, kind) in pages.items():
        add("/console/" if name == "index.html" else f"/console/{name}", content, kind)
    return routes
