"""What every endpoint needs, made once by ``app.py``."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from server.config import HttpConfig
from server.engine.request import Service
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Context:
    """The engine, the limits of HTTP, and where numbers go."""

    service: Service
    config: HttpConfig
    metrics: Metrics


def context_of(request: Request) -> Context:
    """The context of the app that serves this request."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
