"""The HTTP application, as data: who may reach which route, and what wraps them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.errors import ManyloraError
from server.config import HttpConfig
from server.engine.request import Service
from server.http import adapters, health, models
from server.http.access_log import AccessLog
from server.http.auth import Keyring, RequireKey, RequireLoopback
from server.http.chat import chat_completions
from server.http.completions import completions
from server.http.context import Context
from server.http.errors import UnexpectedErrors, on_error, on_http_exception
from server.metrics import Metrics

Endpoint = Callable[[Request], Awaitable[Response]]
Rows = Sequence[tuple[str, str, Endpoint]]

OPEN: Rows = (
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
)
CLIENTS: Rows = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.get_model),
    ("GET", "/version", health.version),
    ("GET", "/metrics", health.metrics),
)
ADMINS: Rows = (
    ("GET", "/v1/adapters", adapters.list_adapters),
    ("POST", "/v1/load_lora_adapter", adapters.load_adapter),
    ("POST", "/v1/unload_lora_adapter", adapters.unload_adapter),
)


def create_app(service: Service, config: HttpConfig) -> Starlette:
    """The application that serves ``service``. It neither starts nor stops it."""
    metrics = Metrics(service)
    app = Starlette(
        routes=[
            *_routes(OPEN, ()),
            *_routes(CLIENTS, _client_guard(config)),
            *_routes(ADMINS, _admin_guard(config)),
        ],
        middleware=[Middleware(AccessLog, metrics), Middleware(UnexpectedErrors)],
        exception_handlers={ManyloraError: on_error, HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.context = Context(service, config, metrics)
    return app


def _routes(rows: Rows, guard: Sequence[Middleware]) -> list[Route]:
    return [Route(path, endpoint, methods=[method], middleware=guard) for method, path, endpoint in rows]


def _client_guard(config: HttpConfig) -> list[Middleware]:
    admin = (config.admin_key,) if config.admin_key and config.api_keys else ()
    return [Middleware(RequireKey, Keyring((*config.api_keys, *admin)))]


def _admin_guard(config: HttpConfig) -> list[Middleware]:
    if config.admin_key:
        return [Middleware(RequireKey, Keyring([config.admin_key]))]
    return [Middleware(RequireLoopback), Middleware(RequireKey, Keyring(config.api_keys))]
