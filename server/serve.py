"""``manylora serve``: run one engine and one HTTP server in one process, and drain them at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
import uvloop

from adapters.errors import ManyloraError
from server.config import ServerConfig
from server.descriptors import fitted, raise_limit
from server.engine.interface import Service
from server.finetune.jobs.errors import StateUnusable
from server.finetune.jobs.training import Training
from server.http.app import SERVED_WHEN_FULL, create_app
from server.http.connection import bounded
from server.http.context import Context
from server.logs import configure
from server.secrets import forget_keys, hide_typed_keys, keys_of, make_private
from server.version import VERSION

logger = logging.getLogger("manylora.serve")

# Seconds in which the answers that still run after the drain can receive their error.
_CLOSE_SECONDS = 2


class AddressUnavailable(ManyloraError):
    """The address to listen on is in use, or does not belong to this machine."""


class RunningService(Service, Protocol):
    """A service that can be started and stopped. ``server/engine/build.py`` makes it."""

    async def start(self) -> None: ...

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, and wait for running ones: True if they ended within ``timeout`` seconds."""

    def stop(self) -> None:
        """Stop the engine. Requests that still run fail."""


Build = Callable[[ServerConfig], RunningService]


def run(config: ServerConfig, build: Build | None = None) -> None:
    """Serve until a signal ends it. Raises ManyloraError if the server cannot start."""
    configure(config.log)
    config = replace(config, connections=fitted(config.connections, raise_limit()))
    listener = _bind(config.http.host, config.http.port)
    hide_typed_keys()
    forget_keys(os.environ, keys_of(config.http))
    _make_private(config.home)
    service = (build or _build)(config)
    uvloop.run(serve(service, config, listener))


async def serve(service: RunningService, config: ServerConfig, listener: socket.socket) -> None:
    """Serve on ``listener`` until SIGTERM or SIGINT, then drain and stop. A second signal skips the drain."""
    training = Training(config, service)  # it blocks, but no request is served yet
    await service.start()
    try:
        training.start()
        server = _Server(service, training, config)
        _announce(service, config, listener)
        try:
            await server.serve(sockets=[listener])
        finally:
            server.context.close()
    finally:
        await training.stop()
        service.stop()
    logger.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn's server. A signal first drains the engine; meanwhile HTTP answers 503 to new requests."""

    def __init__(self, service: RunningService, training: Training, config: ServerConfig) -> None:
        app = create_app(service, config.http, training)
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(config.connections, SERVED_WHEN_FULL),
                ws="none",
                timeout_keep_alive=config.connections.timeout_keep_alive,
                log_config=None,
                access_log=False,
                lifespan="off",
                proxy_headers=False,  # the admin routes rely on the peer's real address
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self.service = service
        self.training = training
        self.context: Context = app.state.context
        self.drain_seconds = config.http.shutdown_timeout
        self.draining: asyncio.Task[None] | None = None
        self.loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.loop.call_soon_threadsafe(self._on_signal, signal.Signals(sig).name)

    def _on_signal(self, name: str) -> None:
        if self.draining is None:
            logger.info("draining", extra={"fields": {"signal": name, "timeout_s": self.drain_seconds}})
            self.draining = asyncio.create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self.training.begin_stop()
        try:
            complete = await self.service.drain(self.drain_seconds)
            logger.info("drained", extra={"fields": {"complete": complete}})
        finally:
            self.context.closing.close()
            self.should_exit = True


def _build(config: ServerConfig) -> RunningService:
    from server.engine.build import build_service  # imports torch, which takes seconds

    return build_service(config)


def _make_private(home: Path) -> None:
    try:
        make_private(home)
    except OSError as error:
        raise StateUnusable(f"--home {home}: {error.strerror}; choose another folder") from None


def _bind(host: str, port: int) -> socket.socket:
    """Bind the address before the model is loaded, so that a port in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise AddressUnavailable(
            f"--host {host} --port {port}: {error.strerror}; choose another address or port"
        ) from None
    return listener


def _announce(service: RunningService, config: ServerConfig, listener: socket.socket) -> None:
    base, (host, port) = service.base, listener.getsockname()[:2]
    fields = {
        "url": f"http://{f'[{host}]' if ':' in host else host}:{port}",
        "version": VERSION,
        "base": base.name,
        "base_digest": base.digest,
        "quantization": base.quantization,
        "head_quantization": base.head_quantization,
        "max_model_len": base.max_model_len,
        "adapters": len(service.adapters()),
    }
    logger.info("serving", extra={"fields": fields})
    if host not in ("127.0.0.1", "::1") and not config.http.api_keys:
        logger.warning("no --api-key is set, so anyone who can reach this address can use the server")
