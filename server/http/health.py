"""``/health``, ``/ready``, ``/version`` and ``/metrics``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from server.http.context import context_of
from server.http.json_response import JSONResponse
from server.version import VERSION


async def health(request: Request) -> JSONResponse:
    """200 while the engine's loop runs. 503 with the reason after it has ended; restart the server then."""
    reason = context_of(request).service.failure()
    if reason is not None:
        return JSONResponse({"status": "failed", "reason": reason}, status_code=503)
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> JSONResponse:
    """200 while the server takes new requests. 503 while it drains or after it has failed."""
    service = context_of(request).service
    if service.failure() is not None:
        return await health(request)
    if service.draining():
        return JSONResponse({"status": "draining"}, status_code=503)
    return JSONResponse({"status": "ready"})


async def version(request: Request) -> JSONResponse:
    """The version of manylora, the attention backend in use, and how the base's weights are stored."""
    base = context_of(request).service.base
    return JSONResponse(
        {"version": VERSION, "attention": base.attention, "weight_bytes": dict(base.weight_bytes)}
    )


async def metrics(request: Request) -> Response:
    """The metrics in Prometheus' text format."""
    text, content_type = context_of(request).metrics.exposition()
    return Response(text, headers={"Content-Type": content_type})
