"""A timer that is moved often and seldom fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls ``missed`` once the latest time that was set has passed, unless it was cleared before.

    Moving it later costs an attribute: the event loop's timer is left as it is, and looks again when it
    fires.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, missed: Callable[[], None]) -> None:
        self._loop = loop
        self._missed = missed
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Set the deadline to ``seconds`` from now."""
        self._at = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._at:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._at, self._look)

    def clear(self) -> None:
        """Remove the deadline."""
        self._at = None

    def close(self) -> None:
        """Remove the deadline and its timer."""
        self._at = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._at is None:
            return
        if self._at > self._loop.time():
            self._timer = self._loop.call_at(self._at, self._look)
        else:
            self._at = None
            self._missed()
