"""Stop work for a client when the client disconnects or the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ShuttingDown
from server.http.errors import ClientDisconnected

T = TypeVar("T")


class Closing:
    """Tells all work for clients that the server ends. It may be made outside an event loop."""

    def __init__(self) -> None:
        self._closed = False
        self._watches: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        """End all work, present and future. Call it on the event loop."""
        self._closed = True
        for watch in self._watches:
            if not watch.done():
                watch.set_result(None)

    def watch(self) -> asyncio.Future[None]:
        """A future that is done after ``close`` was called. Cancel it when it is no longer needed."""
        watch = asyncio.get_running_loop().create_future()
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        if self._closed:
            watch.set_result(None)
        return watch


async def until_disconnect(receive: Receive, closing: Closing, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. Cancels ``work`` if the client disconnects or the server ends.

    The whole body of the request must have been read. The next message of ``receive`` is then the disconnect.

    Raises:
        ClientDisconnected: the client disconnected first.
        ShuttingDown: ``closing`` was closed first.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    closed = closing.watch()
    tasks: tuple[asyncio.Future[Any], ...] = (working, gone, closed)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if closed.done():
            raise ShuttingDown("The server ended before the answer was complete; send the request again.")
        raise ClientDisconnected("The client disconnected before its answer was complete.")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
