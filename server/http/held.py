"""How many bytes of large bodies are in memory, coming or waiting to be tokenised: no more than so many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from server.errors import QueueFull

MAX_LARGEST = 32
"""So many bodies of the largest size may be held at once."""


class HeldBodies:
    """Lives on the event loop.

    If there would be too many bytes, the body that has been coming for longest gives way: whoever sends a
    large one slowly shuts nobody out. Bodies that have come stay, and if there are only such, the newcomer is
    refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._coming: dict[Hold, None] = {}  # oldest first

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Of one body, from its first byte until nobody needs it any more."""
        hold = Hold()
        try:
            yield hold
        finally:
            self._held -= hold.size

    @asynccontextmanager
    async def coming(self, hold: Hold) -> AsyncIterator[None]:
        """While the body comes. Raises QueueFull when it has to give way."""
        self._coming[hold] = None
        try:
            async with asyncio.timeout(None) as hold.patience:
                yield
        except TimeoutError:
            raise self._full() from None
        finally:
            self._coming.pop(hold, None)

    def grow(self, hold: Hold, size: int) -> None:
        """The body has ``size`` bytes now. Raises QueueFull if there are too many."""
        while self._held + size - hold.size > self._most:
            self._end_oldest(hold)
        self._held += size - hold.size
        hold.size = size

    def _end_oldest(self, newcomer: Hold) -> None:
        oldest = next((each for each in self._coming if each.size), newcomer)
        if oldest is newcomer:
            raise self._full()
        del self._coming[oldest]
        self._held -= oldest.size
        oldest.size = 0
        oldest.give_way()

    def _full(self) -> QueueFull:
        return QueueFull(
            f"Large requests of {self._most} bytes are being read already; send this one again.",
            retry_after=1,
        )


class Hold:
    """One body's share of ``HeldBodies``.

    Attributes:
        size: bytes of it that are counted.
        patience: ends its reading; None before that.
    """

    def __init__(self) -> None:
        self.size = 0
        self.patience: asyncio.Timeout | None = None

    def give_way(self) -> None:
        if self.patience is not None:
            self.patience.reschedule(0)
