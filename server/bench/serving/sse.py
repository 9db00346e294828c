"""Server-sent events, incrementally: bytes in, the payloads of whole events out. No I/O."""

from __future__ import annotations


class SSEDecoder:
    """Feed it network chunks cut anywhere; it gives back each event's data once its empty line has come.

    Lines end in LF or CRLF; comments and fields other than ``data`` are skipped. (The lone CR that the
    standard also allows is left out: no server sends it, and only waiting tells it from half a CRLF.)
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
