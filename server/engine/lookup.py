"""Looks up an adapter that is not registered yet: checks its folder, off the event loop.

Requests may name anything, so lookups are bounded. Requests for one name share a lookup, its result is
remembered for a while, and only a limited number of names are looked up at a time. A request beyond that
limit gets the current state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from adapters.errors import AdapterNameInvalid
from adapters.paths import check_name
from server.pools import Pool

log = logging.getLogger("manylora.engine")

REMEMBERED_SECONDS = 1.0
"""Seconds after a lookup during which a name is not looked up again."""
MAX_REMEMBERED = 1024
MAX_LOOKS = 64
"""Most names that are being looked up, or wait for it, at a time."""
PATIENCE = 5.0
"""Seconds that a request waits for a lookup, which may have to read a large adapter."""


class AdapterLookup:
    """Runs on the event loop; ``look`` runs in its own threads."""

    def __init__(self, look: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``look`` registers the adapter of a name if its folder exists; it blocks."""
        self._look = look
        self._clock = clock
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._remembered: OrderedDict[str, float] = OrderedDict()  # name -> end of its look, oldest first
        self._pool = Pool("adapter-lookups")

    async def look_for(self, name: str) -> None:
        """Returns when the folder has been checked, or need not be. Ask the registry for the result."""
        look = self._under_way.get(name) or self._begin(name)
        if look is not None:
            await asyncio.wait((look,), timeout=PATIENCE)

    def close(self) -> None:
        """Start no more lookups, and wait for the running ones."""
        self._pool.close()

    def _begin(self, name: str) -> asyncio.Task[None] | None:
        """Start a lookup; None if the name is not allowed, was just looked up, or there are too many."""
        if len(self._under_way) >= MAX_LOOKS or self._is_remembered(name) or not _is_allowed(name):
            return None
        look = asyncio.create_task(self._pool.run(self._look_safely, name))
        self._under_way[name] = look
        look.add_done_callback(lambda _: self._end(name))
        return look

    def _look_safely(self, name: str) -> None:
        try:
            self._look(name)
        except Exception:
            log.exception("looking up adapter %s failed", name)

    def _end(self, name: str) -> None:
        del self._under_way[name]
        self._remembered[name] = self._clock()
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _is_remembered(self, name: str) -> bool:
        ended = self._remembered.get(name)
        if ended is None:
            return False
        if self._clock() - ended < REMEMBERED_SECONDS:
            return True
        del self._remembered[name]
        return False


def _is_allowed(name: str) -> bool:
    with suppress(AdapterNameInvalid):
        return bool(check_name(name))
    return False
