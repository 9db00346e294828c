"""Threads for blocking work, in one small pool for each kind. A slow kind never delays another kind.

The event loop's default executor is not used, because all code shares it. The code that makes a pool also
closes it. ``POOLS`` has the kinds, and the most threads of each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Kind = Literal[
    "bodies",
    "tokenizing",
    "long-texts",
    "templates",
    "adapters",
    "adapter-lookups",
    "database",
    "database-writes",
    "disk",
    "file-checks",
    "job-checks",
]
POOLS: dict[Kind, int] = {
    "bodies": 1,  # parsing of large bodies; it holds the GIL, so two threads would not be faster
    "tokenizing": 2,
    "long-texts": 1,  # tokenising a long text takes much memory, so one at a time
    "templates": 2,  # adapters' templates; each runs in its own process, up to its time limit
    "adapters": 2,
    "adapter-lookups": 2,
    "database": 2,
    "database-writes": 1,  # SQLite has one writer; reads must not wait for it
    "disk": 2,
    "file-checks": 1,  # each has its own process, and two would use all of a small machine
    "job-checks": 1,  # as file-checks; each process takes some hundred MB
}


class Pool:
    """The threads of one kind of work. They start when they are needed."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._threads = ThreadPoolExecutor(POOLS[kind], kind)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in one of the threads, and return its result.

        If the waiting task is cancelled, work that has not begun is dropped. Work that has begun continues,
        but its result is dropped.
        """
        future = self._threads.submit(work, *args, **kwargs)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop work that has not begun, and wait for the rest."""
        self._threads.shutdown(cancel_futures=True)
