"""The HTTP application as tables: the routes, who may call them, and the middleware."""

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
from server.engine.interface import Service
from server.finetune.jobs.training import Training
from server.http import adapters, files, fine_tuning, health, models
from server.http.access_log import AccessLog
from server.http.auth import Keyring, RequireKey, RequireLoopback
from server.http.chat import chat_completions
from server.http.completions import completions
from server.http.context import Context
from server.http.errors import UnexpectedErrors, on_error
from server.http.hosts import RequireKnownHost
from server.http.metrics import Metrics
from server.http.openapi import openapi
from server.http.urls import IgnoreLastSlash, on_http_exception

Endpoint = Callable[[Request], Awaitable[Response]]
Routes = Sequence[tuple[str, str, Endpoint]]

PROBE_ROUTES: Routes = (
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
)
CLIENT_ROUTES: Routes = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.get_model),
    ("GET", "/version", health.version),
    ("GET", "/openapi.json", openapi),
)
METRICS_ROUTES: Routes = (("GET", "/metrics", health.metrics),)
TRAINING_ROUTES: Routes = (
    ("POST", "/v1/files", files.upload_file),
    ("GET", "/v1/files", files.list_files),
    ("GET", "/v1/files/{file}", files.get_file),
    ("GET", "/v1/files/{file}/content", files.get_content),
    ("DELETE", "/v1/files/{file}", files.delete_file),
    ("POST", "/v1/fine_tuning/jobs", fine_tuning.create_job),
    ("GET", "/v1/fine_tuning/jobs", fine_tuning.list_jobs),
    ("GET", "/v1/fine_tuning/jobs/{job}", fine_tuning.get_job),
    ("POST", "/v1/fine_tuning/jobs/{job}/cancel", fine_tuning.cancel_job),
    ("POST", "/v1/fine_tuning/jobs/{job}/pause", fine_tuning.pause_job),
    ("POST", "/v1/fine_tuning/jobs/{job}/resume", fine_tuning.resume_job),
    ("GET", "/v1/fine_tuning/jobs/{job}/events", fine_tuning.list_events),
    ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints", fine_tuning.list_checkpoints),
    ("DELETE", "/v1/models/{model:path}", fine_tuning.delete_model),
)
ADMIN_ROUTES: Routes = (
    ("GET", "/v1/adapters", adapters.list_adapters),
    ("POST", "/v1/load_lora_adapter", adapters.load_adapter),
    ("POST", "/v1/unload_lora_adapter", adapters.unload_adapter),
)

SERVED_WHEN_FULL = frozenset(path for _, path, _ in (*PROBE_ROUTES, *METRICS_ROUTES, *ADMIN_ROUTES))
"""Paths that are served even when every connection is busy. Operators need them to find the cause."""


def create_app(service: Service, config: HttpConfig, training: Training | None = None) -> Starlette:
    """The application that serves ``service``. The caller starts and stops the service.

    Without ``training`` the application has no routes for files and fine-tuning.
    """
    metrics = Metrics(service)
    if training is not None:
        metrics.add(training.collector())
    app = Starlette(
        routes=[
            *_routes(PROBE_ROUTES, ()),
            *_routes(CLIENT_ROUTES, _client_guard(config)),
            *_routes(METRICS_ROUTES, _scraper_guard(config)),
            *(_routes(TRAINING_ROUTES, _trainer_guard(config)) if training is not None else ()),
            *_routes(ADMIN_ROUTES, _admin_guard(config)),
        ],
        middleware=[
            Middleware(AccessLog, metrics),
            Middleware(UnexpectedErrors),
            Middleware(RequireKnownHost, config),
            Middleware(IgnoreLastSlash),
        ],
        exception_handlers={ManyloraError: on_error, HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.context = Context(service, config, metrics, training)
    return app


def _routes(routes: Routes, guard: Sequence[Middleware]) -> list[Route]:
    return [Route(path, endpoint, methods=[method], middleware=guard) for method, path, endpoint in routes]


def _client_guard(config: HttpConfig) -> list[Middleware]:
    admin = (config.admin_key,) if config.admin_key and config.api_keys else ()
    return [Middleware(RequireKey, Keyring((*config.api_keys, *admin)))]


def _scraper_guard(config: HttpConfig) -> list[Middleware]:
    """As clients. A metrics key opens the route too, and then the route always needs a key."""
    if config.metrics_key is None:
        return _client_guard(config)
    admin = (config.admin_key,) if config.admin_key else ()
    return [Middleware(RequireKey, Keyring((config.metrics_key, *config.api_keys, *admin)))]


def _trainer_guard(config: HttpConfig) -> list[Middleware]:
    """As clients if they need a key, otherwise as admins: strangers must not read data or fill the disk."""
    return _client_guard(config) if config.api_keys else _admin_guard(config)


def _admin_guard(config: HttpConfig) -> list[Middleware]:
    if config.admin_key:
        return [Middleware(RequireKey, Keyring([config.admin_key]))]
    return [Middleware(RequireLoopback), Middleware(RequireKey, Keyring(config.api_keys))]
