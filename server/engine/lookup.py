"""An adapter that nobody knows yet: its folder is looked at once, off the event loop, before it is refused.

Requests name what they like, so a look is cheap to repeat: those who ask for one name share it, its result
holds for a while, and only so many names are looked at at once. Whoever comes in excess is told what is
known.
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
"""For so long after a look a name is not looked at again."""
MAX_REMEMBERED = 1024
MAX_LOOKS = 64
"""Names that are looked at, or wait for it, at once."""
PATIENCE = 5.0
"""Seconds that a request waits for a look, which may have to read a large adapter."""


class AdapterLookup:
    """Lives on the event loop; ``look`` runs in threads of its own."""

    def __init__(self, look: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``look`` registers the adapter of that name if its folder is there; it blocks."""
        self._look = look
        self._clock = clock
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._remembered: OrderedDict[str, float] = OrderedDict()  # name -> end of its look, oldest first
        self._pool = Pool("adapter-lookups")

    async def look_for(self, name: str) -> None:
        """Returns once the folder was looked at, or need not be; nobody learns here what was found."""
        look = self._under_way.get(name) or self._begin(name)
        if look is not None:
            await asyncio.wait((look,), timeout=PATIENCE)

    def close(self) -> None:
        """Begin no further look, and wait for those under way."""
        self._pool.close()

    def _begin(self, name: str) -> asyncio.Task[None] | None:
        """A look, under way from now on; None if the name is not allowed, or was looked at just now."""
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
            log.exception("looking for adapter %s failed", name)

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
