"""Middleware: one request id and one log line for each request. Prompts and answers are never logged."""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.metrics import Metrics
from server.http.record import Record, attach

logger = logging.getLogger("manylora.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = {"/health", "/ready", "/metrics"}


class AccessLog:
    """Gives each request a ``Record``, sends its id with the answer, and logs it when the request ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(_request_id(Headers(scope=scope)))
        attach(scope, record)

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
                record.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, identified)
        finally:
            self._finish(scope, record)

    def _finish(self, scope: Scope, record: Record) -> None:
        route = getattr(scope.get("route"), "path", "none")
        duration = record.elapsed()
        self.metrics.request(route, record, duration)
        quiet = route in _PROBES and record.status == 200
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={"fields": _fields(scope, route, record, duration)},
        )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _fields(scope: Scope, route: str, record: Record, duration: float) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": scope["method"],
        "route": route,
        "status": record.status,
        "duration_s": round(duration, 4),
    }
    noted = {
        "error": record.error,
        "completion_id": record.completion_id,
        "model": record.model,
        "adapter": record.adapter,
        "user": record.user,
        "ttft_s": record.ttft and round(record.ttft, 4),
        "queue_s": record.queue_seconds and round(record.queue_seconds, 4),
    }
    fields |= {name: value for name, value in noted.items() if value is not None}
    if record.generated:
        fields |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
        }
    return fields
