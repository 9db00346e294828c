"""The objects that all endpoints share. ``app.py`` makes them once."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from server.config import HttpConfig
from server.engine.interface import Service
from server.finetune.jobs.training import Training
from server.http.body_memory import MAX_LARGEST_BODIES, BodyMemory
from server.http.disconnect import Closing
from server.http.metrics import Metrics
from server.pools import Pool


@dataclass(frozen=True, slots=True)
class Context:
    """The engine's service, the HTTP settings, the metrics and fine-tuning.

    Attributes:
        training: files and fine-tuning jobs; None: this server has neither.
        closing: closed when the time to drain is over. Running answers then end with an error.
        bodies: the thread that parses large bodies.
        body_memory: limits the memory of large bodies.
    """

    service: Service
    config: HttpConfig
    metrics: Metrics
    training: Training | None
    closing: Closing = field(default_factory=Closing)
    bodies: Pool = field(default_factory=lambda: Pool("bodies"))
    body_memory: BodyMemory = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "body_memory", BodyMemory(self.config.max_body_bytes * MAX_LARGEST_BODIES))

    def close(self) -> None:
        """End the threads. Call it when the server has stopped."""
        self.bodies.close()


def context_of(request: Request) -> Context:
    """The context of the app that serves this request."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


def training_of(request: Request) -> Training:
    """The app's ``training``. Only routes that need it may call this."""
    training = context_of(request).training
    assert training is not None
    return training
