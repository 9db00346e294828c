"""Allocates the rank rows of a site's pool. Integers only.

An adapter of rank r takes any r free rows. Adjacent rows are preferred, because a kernel can read them in
place.
"""

from __future__ import annotations

from adapters.pool.free_runs import FreeRuns, runs_of


class RowAllocator:
    """Rows 0 … ``num_rows``-1 of one site's pool."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._runs = FreeRuns(num_rows)

    @property
    def num_free(self) -> int:
        return self._runs.num_free

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` rows, ascending: the lowest run that is long enough, else the lowest free rows.

        Returns None and changes nothing if fewer rows are free.
        """
        if count > self._runs.num_free:
            return None
        if count == 0:
            return []
        start = self._runs.take_run(count)
        return self._runs.take_lowest(count) if start is None else list(range(start, start + count))

    def free(self, rows: list[int]) -> None:
        for start, stop in runs_of(rows):
            self._runs.free(start, stop)

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Assert that ``owned`` (one list for each live adapter) and the free rows are the whole pool."""
        self._runs.check_integrity(run for rows in owned for run in runs_of(rows))
