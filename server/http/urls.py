"""Answers for unknown URLs and methods. Their codes differ from those of a missing model or adapter."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.json_response import JSONResponse
from server.http.record import record_of

CODES = {404: "unknown_url", 405: "method_not_supported"}
"""OpenAI's error codes, by status."""


class IgnoreLastSlash:
    """Middleware: treat ``/v1/models/`` as ``/v1/models``. After a redirect, clients drop a POST's body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith("/") and len(path) > 1:
            scope["path"] = path[:-1]
        await self.app(scope, receive, send)


async def on_http_exception(http: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors (unknown path, wrong method) in OpenAI's error shape."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code)
    record_of(http).error = code
    headers = {"Allow": _allowed(http)} if error.status_code == 405 else error.headers
    body = {"message": _message(http, error), "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=headers)


def _message(http: Request, error: HTTPException) -> str:
    asked = f"{http.method} {http.url.path[:200]}"
    if error.status_code == 404:
        return f"Unknown request URL: {asked}. {_hint(http)}"
    if error.status_code == 405:
        return f"{asked} is not supported; use {_allowed(http)} with this URL."
    return f"{asked}: {error.detail}."


def _allowed(http: Request) -> str:
    """The methods of all routes with this path. Starlette itself lists only those of the first route."""
    routes = [each for each in http.app.routes if isinstance(each, Route)]
    fitting = [each.methods or () for each in routes if each.matches(http.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for methods in fitting for method in methods} - {"HEAD"}))


def _hint(http: Request) -> str:
    """The URL that the client probably meant. Usually its ``base_url`` lacks ``/v1`` or repeats it."""
    path = "/" + "/".join(part for part in http.url.path.split("/") if part and part != "v1")
    routes = {route.path for route in http.app.routes if isinstance(route, Route)}
    meant = next((each for each in (f"/v1{path}", path) if each in routes), None)
    if meant is None:
        return "docs/api.md of manylora lists the URLs."
    return f"Did you mean {meant}? A client's base URL must end in /v1, without a slash after it."
