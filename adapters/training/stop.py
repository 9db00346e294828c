"""A request to stop. Training stops at the end of a step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """``requested`` becomes True once and stays True.

    Inside ``graceful`` the first signal only requests a stop. A second one, or one outside, interrupts at
    once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._graceful = False

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """The context in which ``requested`` is checked regularly."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or not self._graceful:
            raise KeyboardInterrupt


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call ``stop``. The previous handlers are restored afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
