"""What is noted about one HTTP request while it is served; the access log and metrics read it at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope

_KEY = "manylora.record"


@dataclass(slots=True)
class Record:
    """One request, never its prompt or answer. Times are seconds.

    Attributes:
        request_id: the client's ``X-Request-Id``, or one made here.
        started: ``time.perf_counter()`` at arrival.
        generated: whether the request reached the engine, so that token counts mean something.
        adapter: the adapter's name; None = the base.
        user: a hash of OpenAI's ``user`` field.
        ttft: from arrival to the first token.
        queue_seconds: time the engine let it wait.
        status: of the answer; of the failure, if one came after streaming had begun.
        error: OpenAI's code of the failure.
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
    """Make ``record`` the one of this ASGI scope."""
    scope[_KEY] = record


def record_of(request: Request) -> Record:
    """The record of this request."""
    record = request.scope[_KEY]
    assert isinstance(record, Record)
    return record
