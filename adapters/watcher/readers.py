"""Threads that read adapters' folders: the quick ones during a scan, the slow ones after it.

This file does not know what reading a folder means.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from tqdm import tqdm

from adapters.artifact.regex import SharedBudget

logger = logging.getLogger("manylora.adapters")

READERS = 2
MAX_LATE = 4
"""How many folders may still be read after their scan. At this number a scan starts no other folder."""
PATTERNS_TOTAL = 0.5
"""Seconds that all patterns of one scan may take. A folder that needs longer is slow."""
PATTERNS_EACH = 0.25

T = TypeVar("T")


class Readers:
    """Runs reads on threads. One thread calls its methods."""

    def __init__(self) -> None:
        self._late: set[Future[None]] = set()
        self._behind: threading.Thread | None = None

    def read(
        self, folders: Sequence[T], read: Callable[[T], None], budget: float, progress: bool = False
    ) -> None:
        """Calls ``read`` for each folder in order, until ``budget`` seconds have passed.

        A read that takes longer continues in the background. With an infinite budget all reads are awaited.
        If patterns or chat templates are slow, ``read`` gets BudgetExceeded.
        """
        self._late = {late for late in self._late if not late.done()}
        if len(self._late) >= MAX_LATE:
            return
        deadline = time.monotonic() + budget
        patterns = SharedBudget(PATTERNS_TOTAL, PATTERNS_EACH)

        def read_in_time(folder: T) -> None:
            if time.monotonic() < deadline:
                with patterns.applied():
                    _read_safely(read, folder)

        readers = ThreadPoolExecutor(READERS, "adapter-reader")
        with tqdm(total=len(folders), desc="Adapters", unit="", disable=None if progress else True) as bar:
            futures = [readers.submit(read_in_time, folder) for folder in folders]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            self._late |= wait(futures, None if budget == math.inf else budget).not_done
        readers.shutdown(wait=False)

    def read_behind(self, folder: T, read: Callable[[T], None]) -> None:
        """Calls ``read`` in the background without a time limit, one folder at a time."""
        if self._behind is None or not self._behind.is_alive():
            self._behind = threading.Thread(
                target=_read_safely, args=(read, folder), name="slow-adapter-reader", daemon=True
            )
            self._behind.start()

    def join(self) -> None:
        """Waits for the reads in progress."""
        wait(self._late)
        if self._behind is not None:
            self._behind.join()


def _read_safely(read: Callable[[T], None], folder: T) -> None:
    try:
        read(folder)
    except Exception:
        logger.exception("reading an adapter's folder failed")
