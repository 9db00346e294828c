"""The one place where errors become HTTP: a table from exception types to statuses, and OpenAI's error shape.

The errors of HTTP itself are defined here too::

    RequestError (server/errors.py)
    └── HttpError
        ├── ModelNotFound           no model has that name; the message lists similar names
        ├── ModelUnavailable        the adapter is known, but cannot be served; the message has the reason
        ├── NotAuthenticated        no key, or an unknown key
        ├── NotAllowed              an admin route, requested from another machine
        ├── BadRequest              not valid HTTP
        ├── HostNotAllowed          the Host header does not name this server
        ├── OriginNotAllowed        a web page of another site sent the request
        ├── UrlTooLong              more bytes than ``--max-url-bytes``
        ├── HeadersTooLarge         more than ``--max-header-bytes`` or ``--max-header-count``
        ├── RequestTooSlow          not received within ``--header-timeout`` or ``--body-timeout``
        ├── TooManyConnections      more requests at once than ``--limit-concurrency``
        ├── BodyTooLarge            more bytes than ``--max-body-bytes``
        ├── BodyNotJson             the body's media type is not JSON
        ├── BodyNotMultipart        an upload's media type is not ``multipart/form-data``
        └── ClientDisconnected      the client has gone; only the log shows this error
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
    """A request that the HTTP layer refuses.

    Attributes:
        param: the field that the error is about, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(HttpError):
    """Neither the base nor an adapter has that name."""


class ModelUnavailable(HttpError):
    """The adapter failed to load, or is being unloaded."""


class NotAuthenticated(HttpError):
    """A key is required. The client sent none, or an unknown one."""


class NotAllowed(HttpError):
    """The route is for administrators only."""


class BadRequest(HttpError):
    """The request is not valid HTTP."""


class HostNotAllowed(HttpError):
    """The Host header does not name this server. The name may have been rebound to our address."""


class OriginNotAllowed(HttpError):
    """A browser sent the request for a web page of another site."""


class UrlTooLong(HttpError):
    """The request's URL has more bytes than allowed."""


class HeadersTooLarge(HttpError):
    """There are too many headers, or they have more bytes than allowed."""


class RequestTooSlow(HttpError):
    """The client took too long to send its request."""


class TooManyConnections(HttpError):
    """All connections are busy."""


class BodyTooLarge(HttpError):
    """The body has more bytes than allowed."""


class BodyNotJson(HttpError):
    """The body's media type is not ``application/json``."""


class BodyNotMultipart(HttpError):
    """The body's media type is not ``multipart/form-data``."""


class ClientDisconnected(HttpError):
    """The client disconnected before its answer was complete."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How clients see a type of error: the HTTP status, and OpenAI's ``type`` and ``code``."""

    status: int
    type: str
    code: str | None


_INVALID = "invalid_request_error"

# The lookup follows the exception's bases, so a subclass without a row uses its parent's row.
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
_RETRY_SOON = (
    request.ShuttingDown,
    request.OutOfMemory,
    adapter.AdapterNotReady,
    adapter.AdapterOutOfMemory,
    jobs.StateBusy,
    TooManyConnections,
)
INTERNAL = Shape(500, "server_error", "internal_error")


def shape_of(error: BaseException) -> Shape:
    """The row of the nearest base class that has one."""
    return next((SHAPES[cls] for cls in type(error).__mro__ if cls in SHAPES), INTERNAL)


def code_of(error: BaseException) -> str | None:
    """OpenAI's machine-readable code: the error's own, or else its row's. Codes of libraries are ignored."""
    own: str | None = getattr(error, "code", None) if isinstance(error, ManyloraError) else None
    return own or shape_of(error).code


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. An error without a row is a bug. Only the log shows its text."""
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
    """The whole HTTP answer to an error, with the headers that its status needs."""
    headers = {}
    if isinstance(error, request.QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, _RETRY_SOON):
        headers["Retry-After"] = "1"
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=shape_of(error).status, headers=headers)


async def on_error(http: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for every ``ManyloraError``."""
    record_of(http).error = code_of(error)
    return error_response(error)


class UnexpectedErrors:
    """Middleware: turn an unexpected exception into one log entry and one answer 500. The server goes on."""

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
