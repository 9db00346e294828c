"""The limits of one connection, over real sockets. They apply before any key is checked."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server.config import HttpConfig
from server.http.connection import MAX_PIPELINED
from server.http.connection_limit import RESERVED_CONNECTIONS, ConnectionLimit
from tests.server.http.live_server import live_server
from tests.support.fake_service import FakeService
from tests.support.waiting import wait_until

GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
SOON = 0.3
"""Seconds that a deadline under test takes."""

Serve = Callable[..., "Server"]


class Server:
    """A server with keys. Connections send a key only if a test says so."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        self.address = address
        self._stack = stack

    def connect(self, data: bytes = b"") -> Client:
        connection = socket.create_connection(
            (urlsplit(self.address).hostname, urlsplit(self.address).port), timeout=10
        )
        self._stack.enter_context(connection)
        connection.sendall(data)
        return Client(connection)

    def is_healthy(self) -> bool:
        return self.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").status() == 200


class Client:
    """One raw connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send the data until the server closes the connection."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.sendall(data)

    def close(self) -> None:
        self.reader.close()
        self.connection.close()

    def status(self) -> int:
        """The status of the next answer; 0: the connection was closed without an answer."""
        try:
            line = self.reader.readline()
        except ConnectionResetError:
            return 0
        return int(line.split()[1]) if line else 0

    def answer(self) -> tuple[int, dict[str, Any]]:
        """The whole next answer."""
        status, length = self.status(), 0
        while (line := self.reader.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return status, json.loads(self.reader.read(length))

    def is_closed(self) -> bool:
        """Whether the server closes the connection without an answer within the socket's timeout."""
        try:
            return self.reader.read(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def serve(service: FakeService, config: HttpConfig) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(keys: tuple[str, ...] = ("k",), **limits: Any) -> Server:
            address = stack.enter_context(live_server(service, replace(config, api_keys=keys), **limits))
            return Server(address, stack)

        yield start


# -- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", 414, "url_too_long"),
        (b"GET /?" + b"a" * (1 << 20) + b" HTTP/1.1\r\n", 414, "url_too_long"),
        (GET + b"a: " + b"b" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"a: " + b"b" * (1 << 20), 431, "headers_too_large"),  # a header without an end
        (GET + b"a" * (1 << 20), 431, "headers_too_large"),  # a header's name without an end
        (GET + b"a: b\r\n" * 300 + b"\r\n", 431, "headers_too_large"),
        (b"\r\n" * (1 << 19), 431, "headers_too_large"),
        (b"nonsense\r\n\r\n", 400, "bad_request"),
        (b"GET /v1/models\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "bad_request"),
    ],
)
def test_too_large_requests_are_refused_before_they_are_read(
    serve: Serve, request_: bytes, status: int, code: str
) -> None:
    server = serve()
    client = server.connect()
    client.send(request_)
    answered, body = client.answer()
    assert (answered, body["error"]["code"]) == (status, code)
    assert client.is_closed()
    assert server.is_healthy()


@pytest.mark.parametrize(
    "unending", [b"5;" + b"x" * (1 << 20), b"0\r\na: " + b"b" * (1 << 20), b"0\r\n" + b"a: b\r\n" * 300]
)
def test_chunk_extensions_and_trailers_are_bounded(serve: Serve, unending: bytes) -> None:
    """The limits include extensions of chunks, and trailers."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client = serve(keys=()).connect(head + b"Transfer-Encoding: chunked\r\n\r\n")
    client.send(unending)
    assert client.answer()[0] == 431


def test_requests_within_the_limits_are_served(serve: Serve) -> None:
    server = serve(keys=())
    padding = b"".join(b"h%d: %s\r\n" % (number, b"v" * 240) for number in range(200))
    client = server.connect()
    for byte in range(0, len(GET), 7):  # in pieces
        client.send(GET[byte : byte + 7])
    client.send(padding + b"\r\n")
    assert client.answer()[0] == 200


def test_the_parser_keeps_no_more_than_the_bound(serve: Serve) -> None:
    """The server disconnects a client that never stops sending, and its memory does not grow meanwhile."""
    client = serve().connect(GET + b"a: ")
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while sent < 1 << 28:
            sent += client.connection.send(b"b" * (1 << 16))
    assert sent < 1 << 28


# -- time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", b"\r\n"])
def test_a_silent_client_is_disconnected(serve: Serve, first: bytes) -> None:
    client = serve(header_timeout=SOON).connect(first)
    assert client.is_closed()


def test_headers_have_a_deadline_even_if_bytes_keep_coming(serve: Serve) -> None:
    client = serve(header_timeout=SOON).connect(GET)
    started = time.monotonic()
    while time.monotonic() - started < 10 * SOON:
        client.send(b"a: b\r\n")
        time.sleep(SOON / 5)
        if time.monotonic() - started > 2 * SOON:
            break
    assert client.answer()[0] == 408


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_a_body_must_arrive_at_a_minimum_rate(
    serve: Serve, service: FakeService, keys: tuple[str, ...]
) -> None:
    """With keys, the server refuses the request first, and does not wait for the rest of the body."""
    client = serve(keys, body_timeout=SOON).connect(POST + b"Content-Length: 1000\r\n\r\n{")
    assert client.answer()[0] == (401 if keys else 408)
    client.send(b" ")
    assert client.is_closed()
    assert not service.running


def test_a_slow_but_steady_body_is_waited_for(serve: Serve, service: FakeService) -> None:
    body = json.dumps(CHAT | {"max_tokens": 2}).encode()
    client = serve((), body_timeout=SOON, min_data_rate=1, header_timeout=SOON).connect(
        POST.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % (len(body) + 20)
    )
    for byte in b" " * 20:
        client.send(bytes([byte]))
        time.sleep(SOON / 8)
    client.send(body)
    assert client.answer()[0] == 200
    assert service.requests


def test_an_answer_has_no_deadline(serve: Serve, service: FakeService) -> None:
    service.hang_at = 1
    server = serve((), header_timeout=SOON, body_timeout=SOON, write_timeout=SOON, timeout_keep_alive=1)
    body = json.dumps(CHAT).encode()
    client = server.connect(
        POST.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    wait_until(lambda: bool(service.running))
    time.sleep(4 * SOON)
    assert service.running
    client.close()
    wait_until(lambda: not service.running)


def test_an_idle_connection_is_closed_even_if_it_sends_blank_lines(serve: Serve) -> None:
    client = serve((), timeout_keep_alive=1).connect(GET + b"\r\n")
    assert client.answer()[0] == 200
    client.send(b"\r\n")
    assert client.is_closed()


def test_a_connection_is_closed_after_a_number_of_requests(serve: Serve) -> None:
    client = serve((), keep_alive_max_requests=3).connect((GET + b"\r\n") * 3)
    assert [client.answer()[0] for _ in range(3)] == [200] * 3
    assert client.is_closed()


def test_an_upgrade_is_answered_and_closed(serve: Serve) -> None:
    client = serve(()).connect(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert client.answer()[0] == 200
    assert client.is_closed()


# -- the connection limit ---------------------------------------------------------------------------


def test_connections_without_requests_do_not_block_others(serve: Serve) -> None:
    """Connections that send nothing, and headers that do not end."""
    server = serve((), limit_concurrency=2)
    held = [server.connect(first) for first in (b"", GET) for _ in range(2 * RESERVED_CONNECTIONS)]
    for _ in range(3):
        assert server.connect(GET + b"\r\n").answer()[0] == 200
    assert held[0].is_closed()


def test_above_the_limit_clients_get_503_and_operators_an_answer(serve: Serve, service: FakeService) -> None:
    service.hang_at = 0
    server = serve((), limit_concurrency=2)
    body = json.dumps(CHAT).encode()
    chat = (
        POST.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    busy = [server.connect(chat) for _ in range(2)]
    wait_until(lambda: len(service.running) == 2)
    refused = httpx.get(f"{server.address}/v1/models")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "too_many_connections"
    for path in ("/health", "/ready", "/metrics", "/v1/adapters"):
        assert httpx.get(f"{server.address}{path}").status_code == 200
    busy[0].close()
    wait_until(lambda: len(service.running) == 1)
    assert httpx.get(f"{server.address}/v1/models").status_code == 200


def test_pipelining_is_served_in_order_and_bounded(serve: Serve, service: FakeService) -> None:
    service.hang_at = 0
    server = serve(())
    few = server.connect((GET + b"\r\n") * MAX_PIPELINED)
    assert [few.answer()[0] for _ in range(MAX_PIPELINED)] == [200] * MAX_PIPELINED
    body = json.dumps(CHAT).encode()
    chat = (
        POST.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    many = server.connect(chat + (GET + b"\r\n") * 1000)
    assert many.is_closed()
    wait_until(lambda: not service.running)


class FakeConnection:
    gone = False

    def evict(self) -> None:
        self.gone = True


def test_the_longest_idle_connection_is_closed_first() -> None:
    connection_limit = ConnectionLimit(2)
    connections = [FakeConnection() for _ in range(2 + RESERVED_CONNECTIONS)]
    assert all(connection_limit.add(connection) for connection in connections)
    connection_limit.mark_busy(connections[0])
    assert connection_limit.add(FakeConnection())
    assert [connection.gone for connection in connections[:3]] == [False, True, False]
    connection_limit.mark_idle(connections[0])  # it has now been idle for the shortest time
    for _ in range(RESERVED_CONNECTIONS - 1):
        assert connection_limit.add(FakeConnection())
    assert not connections[0].gone


def test_without_an_idle_connection_a_new_one_is_refused() -> None:
    connection_limit = ConnectionLimit(2)
    connections = [FakeConnection() for _ in range(2 + RESERVED_CONNECTIONS)]
    for number, connection in enumerate(connections):
        assert connection_limit.add(connection)
        connection_limit.mark_busy(connection)
        assert connection_limit.full is (number >= 2)
    assert not connection_limit.add(FakeConnection())
    connection_limit.remove(connections[0])
    assert connection_limit.add(FakeConnection())
