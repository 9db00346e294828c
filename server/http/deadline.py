"""A timer that is cheap to move and seldom fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls ``missed`` when the time that was set last has passed, unless the deadline was cleared.

    Setting a later time only changes an attribute. The event loop's timer stays, and when it fires, it is
    started again for the rest of the time.
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
            self._timer = self._loop.call_at(self._at, self._on_timer)

    def clear(self) -> None:
        """Remove the deadline."""
        self._at = None

    def close(self) -> None:
        """Remove the deadline and its timer."""
        self._at = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        if self._at is None:
            return
        if self._at > self._loop.time():
            self._timer = self._loop.call_at(self._at, self._on_timer)
        else:
            self._at = None
            self._missed()
