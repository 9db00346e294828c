"""Clients of apps over the fake service, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.config import HttpConfig, from_args
from server.http.app import create_app
from tests.server.http.live_server import live_server
from tests.support.fake_service import FakeService, adapter

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
    """Makes a client of a server with other settings. The client's address is ``host``."""
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
