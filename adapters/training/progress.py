"""The progress and speed of a run as a bar or lines on stderr, and pauses that limit its share of time."""

from __future__ import annotations

import sys
import time
from collections import deque

from tqdm import tqdm

_WINDOW = 20
LINE_SECONDS = 10.0
"""Seconds between two lines, if there is no terminal for a bar."""


class LineTimer:
    """Decides when another line is due: at once, and then every ``LINE_SECONDS``."""

    def __init__(self) -> None:
        self._next = -1.0

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + LINE_SECONDS
        return True


class Throttle:
    """Sleeps so that the work between its calls takes at most the share ``duty`` of the time."""

    def __init__(self, duty: float) -> None:
        self._rest = 1 / duty - 1
        self._woke = time.monotonic()

    def pause(self) -> None:
        if self._rest > 0:
            time.sleep((time.monotonic() - self._woke) * self._rest)
            self._woke = time.monotonic()


class Progress:
    """Counts tokens by step. Shows a bar on a terminal, and occasional lines elsewhere."""

    def __init__(self, total_steps: int, done: int, show: bool) -> None:
        self._total, self._done = total_steps, done
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], _WINDOW + 1)
        self._bar = tqdm(
            total=total_steps, initial=done, desc="Training", unit="step", disable=None if show else True
        )
        self._lines = show and not sys.stderr.isatty()
        self._timer = LineTimer()
        self.tokens = 0

    def step(self, step: int, loss: float) -> tuple[float, float]:
        """Record a step. Returns recent tokens a second, and the estimated seconds that remain."""
        self._recent.append((time.monotonic(), self.tokens))
        (begin, before), (now, tokens) = self._recent[0], self._recent[-1]
        seconds = max(now - begin, 1e-9)
        speed = (tokens - before) / seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s", refresh=False)
        self._bar.update(step - self._done)
        self._done = step
        left = (self._total - step) * seconds / (len(self._recent) - 1)
        if self._lines and (self._timer.is_due() or step == self._total):
            text = f"Step {step} of {self._total}: loss {loss:.3f}, {speed:.0f} tokens/s, {left:.0f} s left."
            print(text, file=sys.stderr, flush=True)
        return speed, left

    def close(self) -> None:
        self._bar.close()
