"""Server-sent events: the chunks, then ``[DONE]``. An error after the first chunk is an ``error`` event."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters.errors import ManyloraError
from server.http.disconnect import Closing, until_disconnect
from server.http.errors import ClientDisconnected, code_of, error_body, shape_of
from server.http.generation import CompletionStream
from server.http.json_response import json_bytes

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Chunks = AsyncGenerator[dict[str, Any], None]


class EventStream(Response):
    """A response that sends ``chunks``.

    An error before the first chunk sets the HTTP status. A later error is sent as an event. At the end of the
    stream all generations are cancelled, whether it was complete, failed or lost its client.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, stream: CompletionStream, closing: Closing) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.stream = stream
        self.closing = closing
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_disconnect(receive, self.closing, self._send_all(send))
        except Exception as error:
            if not self.started:
                raise
            await self._send_error(error, send)
        finally:
            self.stream.cancel()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                if not self.started:
                    self.started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _send_body(send, _event(chunk))
        await _send_body(send, DONE, more=False)

    async def _send_error(self, error: Exception, send: Send) -> None:
        record = self.stream.record
        record.status, record.error = shape_of(error).status, code_of(error)
        if not isinstance(error, ManyloraError):
            logger.error("streaming failed unexpectedly", exc_info=error)
        if not isinstance(error, ClientDisconnected):
            await _send_body(send, b"event: error\n" + _event(error_body(error)), more=False)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(data) + b"\n\n"


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
