"""How many connections there are, and which of them give way when there are too many."""

from __future__ import annotations

from typing import Protocol

SPARE = 16
"""Places beyond the limit, for probes, metrics and admin routes."""


class Guest(Protocol):
    """A connection."""

    def give_way(self) -> None:
        """Close now; nobody waits for an answer on it."""


class Places:
    """At most ``most`` connections with a request, and ``most + SPARE`` connections in all.

    A connection has a request from the last byte of its headers to the last byte of the answer. Before and
    after that it is idle, and of the idle ones the one that has been so for longest gives way to a newcomer:
    who only holds connections open, or never ends its headers, shuts nobody out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._idle: dict[Guest, None] = {}
        self._busy: set[Guest] = set()

    @property
    def full(self) -> bool:
        """Whether more connections have a request than shall."""
        return len(self._busy) > self.most

    def enter(self, guest: Guest) -> bool:
        """Take in a new connection, which is idle; False if there is no room even for it."""
        if len(self._idle) + len(self._busy) >= self.most + SPARE:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            del self._idle[oldest]
            oldest.give_way()
        self._idle[guest] = None
        return True

    def begin(self, guest: Guest) -> None:
        """It has a request now."""
        self._idle.pop(guest, None)
        self._busy.add(guest)

    def rest(self, guest: Guest) -> None:
        """It is idle again."""
        self._busy.discard(guest)
        self._idle[guest] = None

    def leave(self, guest: Guest) -> None:
        """It is gone; harmless a second time."""
        self._busy.discard(guest)
        self._idle.pop(guest, None)
