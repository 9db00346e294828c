"""uvicorn's connection with limits on size and time. They apply before any API key is checked.

uvicorn itself limits neither headers nor the time that a client takes to send or read. An answer would
stay in memory forever if its client did not read it. Here each phase of a connection has a deadline::

    idle --first byte--> head --last header--> body --last byte--> answer --last byte--> idle

``header_timeout`` and ``timeout_keep_alive`` limit the phases idle and head. In the phase body, and while an
answer waits to be read, the client must transfer at least ``min_data_rate``. A request that is refused here
reaches no middleware, so this module also writes its log line.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from typing import ClassVar, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.config import ConnectionConfig
from server.http.connection_limit import ConnectionLimit
from server.http.deadline import Deadline
from server.http.errors import (
    BadRequest,
    HeadersTooLarge,
    HttpError,
    RequestTooSlow,
    TooManyConnections,
    UrlTooLong,
    code_of,
    error_response,
    shape_of,
)
from server.http.hosts import host_of_absolute_target

logger = logging.getLogger("manylora.connection")

MAX_PIPELINED = 8
"""How many requests may wait on one connection for earlier answers."""
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 16 << 20
"""How long, and for how many bytes, we still read from a refused client. Otherwise it may miss the error."""


class Phase(Enum):
    """What a connection waits for."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()


class BoundedConnection(HttpToolsProtocol):
    """A connection with limits, as the module describes. ``bounded`` makes the class that a server uses.

    Attributes:
        limits: the limits of each connection.
        connection_limit: shared by all connections of the server.
        served_when_full: paths that are served even when every connection is busy.
    """

    limits: ClassVar[ConnectionConfig]
    connection_limit: ClassVar[ConnectionLimit]
    served_when_full: ClassVar[frozenset[bytes]]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.phase = Phase.IDLE
        self._reading = Deadline(self.loop, self._reads_too_slowly)
        self._writing = Deadline(self.loop, self._writes_too_slowly)
        self._unsent = 0
        self._requests = 0
        self._head_bytes = 0
        self._progress = self._without_progress = 0
        self._body_bytes = self._body_seen = 0
        self._was_paused = False
        self._stopped_for: HttpError | None = None
        self._refusal: HttpError | None = None
        self._cycles: deque[RequestResponseCycle] = deque()
        self._discarded = 0
        if self.connection_limit.add(self):
            self._reading.set(self.limits.header_timeout)
        else:
            self._turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection_limit.remove(self)
        self._reading.close()
        self._writing.close()
        self._disconnect_all()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        progress = self._progress
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no upgrade is supported: answer as HTTP, then close the connection
        except httptools.HttpParserError as error:
            self.refuse(self._stopped_for or BadRequest(f"The request is not valid HTTP: {error}."))
            return
        # The parser buffers some bytes itself, such as half a header. No callback reports them.
        self._without_progress = self._without_progress + len(data) if self._progress == progress else 0
        if self._without_progress > self.limits.max_header_bytes:
            self.refuse(self._headers_too_large())

    # -- callbacks of the parser ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._progress += 1
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(
                BadRequest(f"More than {MAX_PIPELINED} requests were sent without waiting for an answer.")
            )
        super().on_message_begin()
        self.phase = Phase.HEAD
        self._head_bytes = 0
        self._reading.set(self.limits.header_timeout)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            self._stop(
                UrlTooLong(f"The URL has more than {self.limits.max_url_bytes} bytes (--max-url-bytes).")
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or a trailer. uvicorn keeps both."""
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.limits.max_header_bytes:
            self._stop(self._headers_too_large())
        if len(self.headers) > self.limits.max_header_count:
            most = self.limits.max_header_count
            self._stop(HeadersTooLarge(f"The request has more than {most} headers (--max-header-count)."))

    def on_headers_complete(self) -> None:
        self._progress += 1
        self.connection_limit.mark_busy(self)
        if self.connection_limit.full and self.url.partition(b"?")[0] not in self.served_when_full:
            most = self.limits.limit_concurrency
            message = f"The server already answers {most} requests (--limit-concurrency); try again soon."
            self._stop(TooManyConnections(message))
        absolute = host_of_absolute_target(self.url)
        if absolute is not None:  # it replaces the header (RFC 9112, 3.2.2)
            self.headers[:] = [*(each for each in self.headers if each[0] != b"host"), (b"host", absolute)]
        super().on_headers_complete()
        self._cycles.append(self.cycle)
        self.phase = Phase.BODY
        self._body_bytes = self._body_seen = 0
        self._was_paused = False
        self._reading.set(self.limits.body_timeout)
        self._requests += 1
        # The parser reads nothing after an upgrade request, even if the server does not upgrade.
        if self._requests >= self.limits.keep_alive_max_requests or self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        self._body_bytes += len(body)
        super().on_body(body)
        self._was_paused = self._was_paused or self.flow.read_paused

    def on_message_complete(self) -> None:
        self._progress += 1
        super().on_message_complete()
        self.phase = Phase.ANSWER
        self._reading.clear()
        if self.cycle.response_complete:
            self._become_idle()

    def on_response_complete(self) -> None:
        self._cycles.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reader()
        elif self.cycle.response_complete and self.phase is Phase.ANSWER:
            self._become_idle()
        elif self.cycle.response_complete and self.phase is Phase.BODY:
            self._reading.set(self.limits.body_timeout)  # for the rest of an unread body

    # -- calls from uvicorn ----------------------------------------------------------------------------

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reader()

    def shutdown(self) -> None:
        super().shutdown()
        self._expect_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._writing.clear()

    # -- deadlines -------------------------------------------------------------------------------------

    def _become_idle(self) -> None:
        self.phase = Phase.IDLE
        self.connection_limit.mark_idle(self)
        self._reading.set(self.limits.timeout_keep_alive)

    def _expect_reader(self) -> None:
        """Start the deadline for the client to read what was written."""
        self._unsent = self.transport.get_write_buffer_size()
        self._writing.set(self.limits.write_timeout)

    def _writes_too_slowly(self) -> None:
        if not (self.flow.write_paused or self.transport.is_closing()):
            return
        read = self._unsent - self.transport.get_write_buffer_size()
        if read >= self.limits.min_data_rate * self.limits.write_timeout:
            self._expect_reader()
            return
        logger.info("closed: the client does not read", extra={"fields": self._peer()})
        self.transport.abort()

    def _reads_too_slowly(self) -> None:
        if self._refusal is not None:
            self.transport.abort()
        elif self.flow.read_paused:  # the server is slow, not the client
            self._reading.set(self.limits.body_timeout)
        elif self.phase is Phase.HEAD:
            seconds = self.limits.header_timeout
            self.refuse(RequestTooSlow(f"The headers took more than {seconds:g} s (--header-timeout)."))
        elif self.phase is Phase.BODY and not self.cycle.response_complete:
            self._expect_more_body()
        else:
            self.evict()

    def _expect_more_body(self) -> None:
        limits = self.limits
        received = self._body_bytes - self._body_seen
        if self._was_paused or received >= limits.min_data_rate * limits.body_timeout:
            self._body_seen, self._was_paused = self._body_bytes, False
            self._reading.set(limits.body_timeout)
            return
        message = f"Only {received} bytes of the body arrived in {limits.body_timeout:g} s (--body-timeout)."
        self.refuse(RequestTooSlow(message))

    # -- ends ------------------------------------------------------------------------------------------

    def evict(self) -> None:
        self.timeout_keep_alive_handler()

    def refuse(self, error: HttpError) -> None:
        """Answer with ``error`` and close. If another answer has begun, only close."""
        self._refusal = error
        fields = self._peer() | {"status": shape_of(error).status, "error": code_of(error)}
        logger.info("refused", extra={"fields": fields})
        if self._is_answering():
            self.transport.abort()
            return
        self.connection_limit.mark_idle(self)
        self._reading.set(_LINGER_SECONDS)
        self.transport.write(_as_bytes(error))
        self.transport.write_eof()
        self._disconnect_all()

    def _turn_away(self) -> None:
        """Refuse a connection for which there is no room. Nothing from the client is read."""
        self._refusal = TooManyConnections("The server has too many connections; try again soon.")
        self.transport.write(_as_bytes(self._refusal))
        self.transport.close()
        self._expect_reader()

    def _stop(self, error: HttpError) -> NoReturn:
        """Stop the parser. ``data_received`` then refuses the request with ``error``."""
        self._stopped_for = error
        raise error

    def _disconnect_all(self) -> None:
        """Cancel all work for this client. uvicorn itself cancels only the last request."""
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > _LINGER_BYTES:
            self.transport.abort()

    def _is_answering(self) -> bool:
        """Whether bytes written now would land in another request's answer."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        return self.cycle.response_started or bool(self.pipeline) or self.phase is not Phase.BODY

    def _headers_too_large(self) -> HeadersTooLarge:
        most = self.limits.max_header_bytes
        return HeadersTooLarge(f"The headers have more than {most} bytes (--max-header-bytes).")

    def _peer(self) -> dict[str, object]:
        return {"client": self.client[0] if self.client else None}


def bounded(limits: ConnectionConfig, served_when_full: Iterable[str]) -> type[BoundedConnection]:
    """The class of one server's connections. They share one ``limit_concurrency``.

    Args:
        served_when_full: paths that are served even when every connection is busy.
    """
    shared = {
        "limits": limits,
        "connection_limit": ConnectionLimit(limits.limit_concurrency),
        "served_when_full": frozenset(path.encode() for path in served_when_full),
    }
    return type("Connection", (BoundedConnection,), shared)


def _as_bytes(error: HttpError) -> bytes:
    """A whole answer with the header ``Connection: close``."""
    response = error_response(error)
    headers = [*response.raw_headers, (b"connection", b"close")]
    lines = [b"%s: %s\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])
