"""Limits the memory of large request bodies, from their first byte until they are tokenised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from server.errors import QueueFull

MAX_LARGEST_BODIES = 32
"""How many bodies of the largest size may be in memory at once."""


class BodyMemory:
    """A byte budget that all large bodies share. Use it on the event loop only.

    When the budget is exceeded, the body that has been arriving for longest is cancelled. A client that sends
    a large body slowly therefore cannot lock others out. Complete bodies are never cancelled: if all bodies
    are complete, the new one is refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._reserved = 0
        self._receiving: dict[Reservation, None] = {}  # oldest first

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """One body's reservation. Hold it from the first byte until the body is no longer needed."""
        reservation = Reservation()
        try:
            yield reservation
        finally:
            self._reserved -= reservation.size

    @asynccontextmanager
    async def receiving(self, reservation: Reservation) -> AsyncIterator[None]:
        """Wrap the reading of the body. Raises QueueFull if the body is cancelled for a newer one."""
        self._receiving[reservation] = None
        try:
            async with asyncio.timeout(None) as reservation.read_timeout:
                yield
        except TimeoutError:
            raise self._full() from None
        finally:
            self._receiving.pop(reservation, None)

    def resize(self, reservation: Reservation, size: int) -> None:
        """Set the body's size to ``size`` bytes. Raises QueueFull if the budget is exceeded."""
        while self._reserved + size - reservation.size > self._max_bytes:
            self._end_oldest(reservation)
        self._reserved += size - reservation.size
        reservation.size = size

    def _end_oldest(self, newcomer: Reservation) -> None:
        oldest = next((each for each in self._receiving if each.size), newcomer)
        if oldest is newcomer:
            raise self._full()
        del self._receiving[oldest]
        self._reserved -= oldest.size
        oldest.size = 0
        oldest.cancel_read()

    def _full(self) -> QueueFull:
        return QueueFull(
            f"The server is already reading {self._max_bytes} bytes of large requests; send this one again.",
            retry_after=1,
        )


class Reservation:
    """One body's part of ``BodyMemory``.

    Attributes:
        size: bytes counted so far.
        read_timeout: cancels the read; None before the read starts.
    """

    def __init__(self) -> None:
        self.size = 0
        self.read_timeout: asyncio.Timeout | None = None

    def cancel_read(self) -> None:
        if self.read_timeout is not None:
            self.read_timeout.reschedule(0)
