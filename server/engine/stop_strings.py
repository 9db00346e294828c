"""Finds stop strings across token boundaries. Text is held back only while it may become a stop string."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """Text that may be sent now, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopScanner:
    """Finds the first of several stop strings in growing text.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> Scan:
        """Add ``text``; the returned text is cut before the earliest stop string."""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            shown, self._held = self._held[:at], ""
            return Scan(shown, stop)
        keep = self._possible_start()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Scan(shown)

    def finish(self) -> str:
        """The text held back at the end, which did not become a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self) -> int:
        """Length of the longest suffix of the held text that starts a stop string."""
        longest = min(max((len(stop) for stop in self._stops), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
