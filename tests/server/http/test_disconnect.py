"""The server cancels a generation as soon as its client disconnects, over a real socket."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.fake_service import FakeService
from tests.support.waiting import wait_until

CHAT: dict[str, Any] = {"model": "poet", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "poet", "prompt": ["a", "b", "c"]}


def open_request(address: str, path: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=5)
    fields = f"Content-Type: application/json\r\nContent-Length: {len(content)}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}"
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_at", [0, 2])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_disconnecting_cancels_the_generation(
    live: str, service: FakeService, path: str, body: dict[str, Any], hang_at: int, stream: bool
) -> None:
    service.hang_at = hang_at
    connection = open_request(live, path, body | {"stream": stream})
    prompts = len(body.get("prompt", [1]))
    wait_until(lambda: len(service.running) == prompts)
    if stream and hang_at:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    assert len(service.running) == prompts
    connection.close()
    wait_until(lambda: not service.running)


def test_a_client_that_stays_is_not_cancelled(live: str, service: FakeService) -> None:
    connection = open_request(live, "/v1/chat/completions", CHAT)
    answer = b""
    while b'"usage"' not in answer:
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")
    assert not service.running
    connection.close()
