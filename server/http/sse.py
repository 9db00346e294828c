"""Server-sent events: chunks as they come, then ``[DONE]``; a late failure is an ``error`` event."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import RequestError
from server.http.disconnect import until_disconnect
from server.http.errors import code_of, error_body, shape_of
from server.http.record import Record

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Chunks = AsyncGenerator[dict[str, Any], None]


class EventStream(Response):
    """A response that sends ``chunks``. Until the first one, an error still becomes a proper HTTP status.

    ``cancel`` is called however the stream ends: complete, failed, or because the client went away.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, record: Record, cancel: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.record = record
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_disconnect(receive, self._send_all(send))
        except Exception as error:
            if self.record.status is None:
                raise
            self.record.status = shape_of(error).status
            self.record.error = code_of(error)
        finally:
            self.cancel()

    async def _send_all(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    if not started:
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        )
                        started = True
                    await _send_body(send, _event(chunk))
            await _send_body(send, DONE, more=False)
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, RequestError):
                logger.exception("streaming failed unexpectedly")
            await _send_body(send, b"event: error\n" + _event(error_body(error)), more=False)
            raise


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
