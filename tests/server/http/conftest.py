"""Apps over the fake service, reached in process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from server.config import HttpConfig, from_args
from server.http.app import SERVED_WHEN_FULL, create_app
from server.http.connection import bounded
from tests.server.http.fake_service import FakeService, adapter

MakeClient = Callable[..., TestClient]


@pytest.fixture
def config() -> HttpConfig:
    return from_args([], {}).http


@pytest.fixture
def service() -> FakeService:
    broken = adapter("broken", state="failed", tier=None, digest=None, reason="its tensors are all zero.")
    ready = {name: adapter(name) for name in ("poet", "router")}
    return FakeService(known=ready | {"broken": broken})


@pytest.fixture
def make_client(service: FakeService, config: HttpConfig) -> Iterator[MakeClient]:
    """A client of a server with some other settings; its peer address is ``host``."""
    opened: list[TestClient] = []

    def make(host: str = "127.0.0.1", **changes: Any) -> TestClient:
        app = create_app(service, replace(config, **changes))
        client = TestClient(app, base_url="http://localhost", client=(host, 1234))
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()


@pytest.fixture
def live(service: FakeService, config: HttpConfig) -> Iterator[str]:
    """The address of a real server on a real socket, in a thread."""
    with live_server(service, config) as address:
        yield address


@contextmanager
def live_server(service: FakeService, config: HttpConfig, **limits: Any) -> Iterator[str]:
    """The same with other limits on connections."""
    connection = bounded(replace(from_args([], {}).connections, **limits), SERVED_WHEN_FULL)
    app = create_app(service, config)
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=0, http=connection, ws="none", log_config=None, access_log=False, lifespan="off"
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Fail if ``condition`` does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
