"""The server disconnects a client that does not read its answer, and frees all that it used."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.config import HttpConfig
from tests.server.http.live_server import live_server
from tests.support.fake_service import BASE, FakeService
from tests.support.waiting import wait_until

SOON = 0.3
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 400_000,
    "logprobs": True,
    "top_logprobs": 5,
}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 400_000, "logprobs": 5}


@pytest.fixture
def address(service: FakeService, config: HttpConfig) -> Iterator[str]:
    """The address of a server with short timeouts."""
    service.base = replace(BASE, max_model_len=10_000_000)
    with live_server(service, config, write_timeout=SOON, timeout_keep_alive=1) as address:
        yield address


def ask(address: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection with a small receive buffer that has sent a request."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect((urlsplit(address).hostname, urlsplit(address).port))
    fields = f"Content-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n".encode() + content)
    return connection


def read(connection: socket.socket, pause: float = 0) -> bytes:
    """All data until the connection or the stream ends."""
    answer = bytearray()
    with suppress(ConnectionResetError):
        while (data := connection.recv(1 << 16)) and not answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            answer += data
            time.sleep(pause)
    return bytes(answer)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_a_stream_without_a_reader_ends(
    address: str, service: FakeService, path: str, body: dict[str, Any]
) -> None:
    with ask(address, path, body | {"stream": True}):
        wait_until(lambda: bool(service.running))
        wait_until(lambda: not service.running, 30)


def test_a_whole_answer_without_a_reader_is_freed(address: str, service: FakeService) -> None:
    """The answer is longer than the buffers of both sides."""
    with ask(address, "/v1/chat/completions", CHAT | {"max_tokens": 20_000}) as connection:
        assert connection.recv(9) == b"HTTP/1.1 "
        assert not service.running
        time.sleep(6 * SOON)
        assert not read(connection).endswith(b"}")


def test_a_slow_reader_gets_the_whole_answer(address: str, service: FakeService) -> None:
    """The client reads more slowly than the answer is generated, but not too slowly."""
    body = CHAT | {"max_tokens": 2000, "stream": True}
    with ask(address, "/v1/chat/completions", body) as connection:
        assert b"[DONE]" in read(connection, 0.001)[-64:]
    wait_until(lambda: not service.running)
