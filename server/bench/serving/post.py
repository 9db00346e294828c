"""One streamed POST with little CPU time, because the load generator shares the machine with the server.

An ``asyncio.Protocol`` with httptools' parser takes 40 us for each token; a general HTTP client takes 140 us.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

OnBody = Callable[[bytes], None]


class Post(asyncio.Protocol):
    """One connection, one request, one answer.

    Args:
        request: the bytes to send (``render``).
        on_body: takes each piece of the body as it arrives, if the status is 200.

    Attributes:
        ended: done when the answer is complete. Raises ``OSError`` if the connection was lost before, and
            ``ValueError`` if the answer is not HTTP.
        status: the HTTP status; None before it has arrived.
        refusal: the body, if the status is not 200.
    """

    def __init__(self, request: bytes, on_body: OnBody) -> None:
        self._request = request
        self._on_body = on_body
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status: int | None = None
        self.refusal = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ValueError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionResetError("the connection closed before the answer was complete"))

    # -- httptools calls these --------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.status == 200:
            self._on_body(body)
        else:
            self.refusal += body

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None) if error is None else self.ended.set_exception(error)
        if self._transport is not None:
            self._transport.close()


async def post(url: str, api_key: str | None, body: dict[str, Any], on_body: OnBody) -> Post:
    """Send ``body`` as JSON and wait until the answer is complete.

    Raises:
        OSError, ValueError: the connection failed or was lost, or the answer is not HTTP.
    """
    target = urlsplit(url)
    name = target.hostname or ""
    secure = ssl.create_default_context() if target.scheme == "https" else None
    port = target.port or (443 if secure else 80)
    message = render(target.path, f"{name}:{port}", api_key, body)
    loop = asyncio.get_running_loop()
    transport, call = await loop.create_connection(lambda: Post(message, on_body), name, port, ssl=secure)
    try:
        await call.ended
    finally:
        transport.close()
    return call


def render(path: str, host: str, api_key: str | None, body: dict[str, Any]) -> bytes:
    """The bytes of the request."""
    content = json.dumps(body).encode()
    headers = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Accept": "text/event-stream",
        "Connection": "close",
    }
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + content
