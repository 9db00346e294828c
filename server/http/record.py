"""Facts about one HTTP request. The access log and the metrics read them when the request ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope

_KEY = "manylora.record"


@dataclass(slots=True)
class Record:
    """One request, without its prompt and answer. Times are in seconds.

    Attributes:
        request_id: the client's ``X-Request-Id``, or a random one.
        started: ``time.perf_counter()`` at arrival.
        generated: whether the request reached the engine. Otherwise the token counts mean nothing.
        adapter: the adapter's name; None: the base.
        user: a hash of OpenAI's ``user`` field.
        ttft: time from arrival to the first token.
        queue_seconds: time in the engine's queue.
        status: the answer's HTTP status. After a failure in a stream, the status of the failure.
        error: OpenAI's error code, if the request failed.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    generated: bool = False
    completion_id: str | None = None
    model: str | None = None
    adapter: str | None = None
    user: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft: float | None = None
    queue_seconds: float | None = None
    status: int | None = None
    error: str | None = None

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.started


def attach(scope: Scope, record: Record) -> None:
    """Store ``record`` in this ASGI scope."""
    scope[_KEY] = record


def record_of(request: Request) -> Record:
    """The request's record. ``AccessLog`` has stored it."""
    record = request.scope[_KEY]
    assert isinstance(record, Record)
    return record
