"""A real server over the fake service, on a real socket, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from server.config import HttpConfig, from_args
from server.http.app import SERVED_WHEN_FULL, create_app
from server.http.connection import bounded
from tests.support.fake_service import FakeService
from tests.support.waiting import wait_until


@contextmanager
def live_server(service: FakeService, config: HttpConfig, **limits: Any) -> Iterator[str]:
    """The server's address. ``limits`` are fields of ``ConnectionConfig``."""
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
