"""A wish to stop, which training grants at the end of a step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """``requested`` turns True once and stays.

    While ``graceful``, a signal only asks; a second one, or one at any other time, interrupts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._graceful = False

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """The stretch in which somebody looks at ``requested`` again and again."""
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
    """SIGINT and SIGTERM call ``stop``; before and after, they do what they did."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
