"""Limits the number of connections, and evicts idle ones for new ones."""

from __future__ import annotations

from typing import Protocol

RESERVED_CONNECTIONS = 16
"""Connections beyond the limit, for probes, metrics and admin routes."""


class EvictableConnection(Protocol):
    """A connection that can be closed while it is idle."""

    def evict(self) -> None:
        """Close the connection now. It has no request in progress."""


class ConnectionLimit:
    """At most ``max_busy`` busy connections, and at most ``max_busy + RESERVED_CONNECTIONS`` in all.

    A connection is busy from the last byte of a request's headers to the last byte of the response, and idle
    otherwise. If the limit is reached, a new connection evicts the one that has been idle for longest. A
    client that only holds connections open, or never ends its headers, therefore cannot lock others out.
    """

    def __init__(self, max_busy: int) -> None:
        self.max_busy = max_busy
        self._idle: dict[EvictableConnection, None] = {}
        self._busy: set[EvictableConnection] = set()

    @property
    def full(self) -> bool:
        """Whether more than ``max_busy`` connections are busy."""
        return len(self._busy) > self.max_busy

    def add(self, connection: EvictableConnection) -> bool:
        """Add a new, idle connection. False if the limit is reached and no connection can be evicted."""
        if len(self._idle) + len(self._busy) >= self.max_busy + RESERVED_CONNECTIONS:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            del self._idle[oldest]
            oldest.evict()
        self._idle[connection] = None
        return True

    def mark_busy(self, connection: EvictableConnection) -> None:
        """A request has begun on the connection."""
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def mark_idle(self, connection: EvictableConnection) -> None:
        """The connection is idle again."""
        self._busy.discard(connection)
        self._idle[connection] = None

    def remove(self, connection: EvictableConnection) -> None:
        """Remove a closed connection. A second call is harmless."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)
