"""How many bytes of large bodies wait to be parsed and tokenised: more than so many are refused, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import QueueFull

MAX_LARGEST = 32
"""So many bodies of the largest size may wait at once."""


class HeldBodies:
    """Lives on the event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Counts ``size`` bytes as held. Raises QueueFull if there would be too many."""
        if self._held + size > self._most:
            raise QueueFull(
                f"{self._held} bytes of large requests wait to be read already; send this one again.",
                retry_after=1,
            )
        self._held += size
        try:
            yield
        finally:
            self._held -= size
