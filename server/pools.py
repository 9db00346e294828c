"""Threads for work that blocks, in small pools by kind: what one kind waits for never delays another.

The event loop's default executor is shared by everybody, so nothing here uses it. Whoever makes a pool
closes it. ``POOLS`` says which kinds there are and how many threads each has at most.
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
    "bodies": 1,  # parsing large bodies: Python holds one lock over it anyway
    "tokenizing": 2,
    "long-texts": 1,  # tokenising takes memory in proportion: one long text at a time
    "templates": 2,  # of adapters, each in a process of its own that may take its full time
    "adapters": 2,
    "adapter-lookups": 2,
    "database": 2,
    "database-writes": 1,  # SQLite has one writer; whoever waits for it must not keep readers waiting
    "disk": 2,
    "file-checks": 1,  # each has a process of its own, and two would take all of a small machine
    "job-checks": 1,  # the same, of some hundred MB each
}


class Pool:
    """The threads of one kind of work. They start when they are first needed."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._threads = ThreadPoolExecutor(POOLS[kind], kind)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``, done in one of the threads.

        If the waiting task is cancelled, work that has not begun is dropped. Work that has begun runs on, and
        its result is dropped.
        """
        future = self._threads.submit(work, *args, **kwargs)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop work that has not begun, and wait for work that has."""
        self._threads.shutdown(cancel_futures=True)
