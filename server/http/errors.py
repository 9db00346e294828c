"""The one place where errors become HTTP: a table from exception type to status, and OpenAI's error shape.

HTTP's own errors are here too::

    RequestError (server/errors.py)
    └── HttpError
        ├── ModelNotFound           no model has that name; the message lists near matches
        ├── ModelUnavailable        an adapter of that name is there, but cannot be served; with its reason
        ├── NotAuthenticated        no key, or an unknown one
        ├── NotAllowed              an admin route, from somewhere that may not use it
        ├── BadRequest              not HTTP, or not by its rules
        ├── HostNotAllowed          asked for by a name that is not this server's
        ├── OriginNotAllowed        asked by a page of another site
        ├── UrlTooLong              more bytes than ``--max-url-bytes``
        ├── HeadersTooLarge         more than ``--max-header-bytes`` or ``--max-header-count``
        ├── RequestTooSlow          not sent within ``--header-timeout`` or ``--body-timeout``
        ├── TooManyConnections      more requests at once than ``--limit-concurrency``
        ├── BodyTooLarge            more bytes than ``--max-body-bytes``
        ├── BodyNotJson             the body is declared as something else than JSON
        ├── BodyNotMultipart        an upload is declared as something else than a form
        └── ClientDisconnected      nobody is left to answer; only the log sees it
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters import errors as adapter
from adapters.errors import ManyloraError
from server import errors as request
from server.finetune.jobs import errors as jobs
from server.http.json_response import JSONResponse
from server.http.record import record_of

logger = logging.getLogger(__name__)


class HttpError(request.RequestError):
    """A request that HTTP itself turns away.

    Attributes:
        param: the field the error is about, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(HttpError):
    """No base and no adapter has that name."""


class ModelUnavailable(HttpError):
    """The adapter is known, but is not served: it failed to load, or is being unloaded."""


class NotAuthenticated(HttpError):
    """A key is needed, and none or an unknown one was sent."""


class NotAllowed(HttpError):
    """The route is for administrators, and this peer is not one."""


class BadRequest(HttpError):
    """What was sent is not HTTP, or breaks one of its rules."""


class HostNotAllowed(HttpError):
    """The Host header has a name that is not this server's: a page may have had it rebound to us."""


class OriginNotAllowed(HttpError):
    """A browser sent this for a page of another site."""


class UrlTooLong(HttpError):
    """The request's URL has more bytes than allowed."""


class HeadersTooLarge(HttpError):
    """The headers are too many, or have more bytes than allowed."""


class RequestTooSlow(HttpError):
    """The client took too long to send its request."""


class TooManyConnections(HttpError):
    """Every connection that may have a request has one."""


class BodyTooLarge(HttpError):
    """The body has more bytes than allowed."""


class BodyNotJson(HttpError):
    """The body's media type is not ``application/json``."""


class BodyNotMultipart(HttpError):
    """The body's media type is not ``multipart/form-data``."""


class ClientDisconnected(HttpError):
    """The client went away before its answer was complete."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a type of error looks to clients: status, and OpenAI's ``type`` and ``code``."""

    status: int
    type: str
    code: str | None


_INVALID = "invalid_request_error"

# Looked up along the exception's bases, so a subclass without a row looks like its parent.
SHAPES: dict[type[BaseException], Shape] = {
    request.InvalidRequest: Shape(400, _INVALID, None),
    request.PromptTooLong: Shape(400, _INVALID, "context_length_exceeded"),
    request.QueueFull: Shape(429, "rate_limit_error", "queue_full"),
    request.ShuttingDown: Shape(503, "server_error", "shutting_down"),
    request.RequestFailed: Shape(500, "server_error", "request_failed"),
    request.AnswerNotRead: Shape(408, _INVALID, "answer_not_read"),
    request.OutOfMemory: Shape(503, "server_error", "out_of_memory"),
    request.EngineDead: Shape(503, "server_error", "engine_dead"),
    ModelNotFound: Shape(404, _INVALID, "model_not_found"),
    ModelUnavailable: Shape(404, _INVALID, "model_unavailable"),
    NotAuthenticated: Shape(401, "authentication_error", "invalid_api_key"),
    NotAllowed: Shape(403, "permission_error", "admin_only"),
    BadRequest: Shape(400, _INVALID, "bad_request"),
    HostNotAllowed: Shape(403, "permission_error", "host_not_allowed"),
    OriginNotAllowed: Shape(403, "permission_error", "origin_not_allowed"),
    UrlTooLong: Shape(414, _INVALID, "url_too_long"),
    HeadersTooLarge: Shape(431, _INVALID, "headers_too_large"),
    RequestTooSlow: Shape(408, _INVALID, "request_timeout"),
    TooManyConnections: Shape(503, "server_error", "too_many_connections"),
    BodyTooLarge: Shape(413, _INVALID, "body_too_large"),
    BodyNotJson: Shape(415, _INVALID, "unsupported_media_type"),
    BodyNotMultipart: Shape(415, _INVALID, "unsupported_media_type"),
    jobs.FileNotKnown: Shape(404, _INVALID, "file_not_found"),
    jobs.FileInUse: Shape(400, _INVALID, "file_in_use"),
    jobs.JobNotKnown: Shape(404, _INVALID, "fine_tuning_job_not_found"),
    jobs.JobConflict: Shape(400, _INVALID, "invalid_job_state"),
    jobs.StorageFull: Shape(507, "server_error", "disk_full"),
    jobs.StateBusy: Shape(503, "server_error", "state_busy"),
    ClientDisconnected: Shape(499, _INVALID, "client_disconnected"),
    adapter.AdapterNotFound: Shape(404, _INVALID, "adapter_not_found"),
    adapter.AdapterNotReady: Shape(503, "server_error", "adapter_not_ready"),
    adapter.AdapterNameInvalid: Shape(400, _INVALID, "adapter_name_invalid"),
    adapter.AdapterExists: Shape(400, _INVALID, "adapter_exists"),
    adapter.AdapterInvalid: Shape(400, _INVALID, "adapter_invalid"),
    adapter.AdapterUnsupported: Shape(400, _INVALID, "adapter_unsupported"),
    adapter.AdapterTooLarge: Shape(400, _INVALID, "adapter_too_large"),
    adapter.AdapterChanged: Shape(409, _INVALID, "adapter_changed"),
    adapter.AdapterOutOfMemory: Shape(503, "server_error", "adapter_out_of_memory"),
}
_SOON_OVER = (
    request.ShuttingDown,
    request.OutOfMemory,
    adapter.AdapterNotReady,
    adapter.AdapterOutOfMemory,
    jobs.StateBusy,
    TooManyConnections,
)
INTERNAL = Shape(500, "server_error", "internal_error")


def shape_of(error: BaseException) -> Shape:
    """The row of the error's nearest base that has one."""
    return next((SHAPES[cls] for cls in type(error).__mro__ if cls in SHAPES), INTERNAL)


def code_of(error: BaseException) -> str | None:
    """OpenAI's machine-readable code: the error's own, else its row's. (Libraries' errors have codes too.)"""
    own: str | None = getattr(error, "code", None) if isinstance(error, ManyloraError) else None
    return own or shape_of(error).code


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. What no row describes is a bug, whose text stays in the log."""
    shape = shape_of(error)
    message = str(error) if shape is not INTERNAL else "The server failed on this request; its log says why."
    return {
        "error": {
            "message": message,
            "type": shape.type,
            "param": getattr(error, "param", None) if isinstance(error, ManyloraError) else None,
            "code": code_of(error),
        }
    }


def error_response(error: BaseException) -> JSONResponse:
    """The whole HTTP answer to an error, with the headers that its status calls for."""
    headers = {}
    if isinstance(error, request.QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, _SOON_OVER):
        headers["Retry-After"] = "1"
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=shape_of(error).status, headers=headers)


async def on_error(http: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for every ``ManyloraError``."""
    record_of(http).error = code_of(error)
    return error_response(error)


class UnexpectedErrors:
    """Middleware: a bug becomes one log entry and one 500; the connection and the server go on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            logger.exception("request failed unexpectedly")
            if started:
                raise
            await error_response(error)(scope, receive, send)
