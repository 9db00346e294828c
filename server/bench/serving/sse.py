"""Parses server-sent events incrementally: bytes in, the payloads of complete events out. No I/O."""

from __future__ import annotations


class SSEDecoder:
    """Takes network chunks, however they are cut, and returns an event's data when its empty line arrives.

    Lines end in LF or CRLF. Comments and fields other than ``data`` are skipped. The standard also allows a
    lone CR; it is not supported, because no server sends it and it looks like the first half of a CRLF.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that ``chunk`` completes, several data lines joined by a newline."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in (line.removesuffix(b"\r") for line in lines):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
