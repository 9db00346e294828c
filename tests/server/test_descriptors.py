"""With few descriptors, fewer connections are accepted. Running requests and operators are still served."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from server import descriptors
from server.config import from_args
from server.http.connection_limit import RESERVED_CONNECTIONS
from tests.support.waiting import wait_until

CONFIG = from_args([], {}).connections
INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "set_to", "holds"),
    [
        (1024, 4096, 4096, 4096),
        (1024, INFINITE, descriptors.MOST, descriptors.MOST),
        (1024, 1 << 20, descriptors.MOST, descriptors.MOST),
        (4096, 4096, None, 4096),
        (INFINITE, INFINITE, None, descriptors.MOST),
    ],
)
def test_the_soft_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, set_to: int | None, holds: int
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert descriptors.raise_limit() == holds
    assert asked == ([] if set_to is None else [(set_to, hard)])


def test_a_limit_that_cannot_be_raised_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.raise_limit() == 256


def test_connections_fit_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    assert descriptors.fitted(CONFIG, 1 << 16) is CONFIG
    assert not caplog.records
    assert descriptors.fitted(CONFIG, 128).limit_concurrency == 64 - RESERVED_CONNECTIONS
    assert descriptors.fitted(CONFIG, 8).limit_concurrency == 1
    assert len(caplog.records) == 2


SERVER = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from server import serve
from server.config import from_args
from tests.server.fake_engine import FakeEngine

class Engine(FakeEngine):
    def __init__(self, config): super().__init__()

serve._announce = lambda service, config, listener: print(listener.getsockname()[1], flush=True)
serve.run(from_args(["--home", sys.argv[1], "--port", "0"], {}), Engine)
"""


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a server that may open 96 files. Its chats hang after the first token."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    wait_until(lambda: accepts(port), 20)  # it prints its port before it listens
    yield port
    process.terminate()
    process.wait(20)


def accepts(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def ask(port: int, request: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    with suppress(ConnectionError):  # it may be refused at once
        connection.sendall(request)
    return connection


def get(port: int, path: str) -> int:
    with ask(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as connection:
        try:
            line = connection.makefile("rb").readline().split()
        except ConnectionError:
            return 0
        return int(line[1]) if line else 0


def test_a_process_with_few_descriptors_goes_on_serving(port: int) -> None:
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    ).encode()
    chat = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chat += b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        served = stack.enter_context(ask(port, chat))
        assert served.recv(12) == b"HTTP/1.1 200"
        for _ in range(300):  # connections that send nothing
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        assert get(port, "/v1/models") == 200
        for _ in range(300):  # connections with a request
            stack.enter_context(ask(port, chat))
        wait_until(lambda: get(port, "/health") == 200)
        wait_until(lambda: get(port, "/v1/models") == 503)
        assert is_open(served)
        assert get(port, "/v1/adapters") == 200
    wait_until(lambda: get(port, "/v1/models") == 200)


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has not closed the connection."""
    connection.setblocking(False)
    try:
        while chunk := connection.recv(1 << 16):
            assert b"error" not in chunk
    except BlockingIOError:
        return True
    return False
