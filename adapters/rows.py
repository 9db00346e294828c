"""Which adapter owns which rank rows of a pool. Integers only.

An adapter of rank r takes r rows of a site's pool, wherever they are free. A run of neighbouring rows is
preferred, since a kernel can then read them in place.
"""

from __future__ import annotations


class RowAllocator:
    """Rows 0 … ``num_rows``-1 of one site's pool."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))  # ascending

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """``count`` ascending rows: the lowest run that is long enough, else the lowest free ones.

        Returns None, and changes nothing, if fewer are free.
        """
        if count > len(self._free):
            return None
        start = self._run_of(count) if count else 0
        taken = self._free[start : start + count]
        del self._free[start : start + count]
        return taken

    def give(self, rows: list[int]) -> None:
        self._free = sorted(self._free + rows)

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Assert that ``owned`` (one list a live adapter) and the free rows are the whole pool."""
        everything = sorted(self._free + [row for rows in owned for row in rows])
        assert everything == list(range(self.num_rows)), "rows leaked or were given twice"

    def _run_of(self, count: int) -> int:
        start = 0
        for i, row in enumerate(self._free):
            if i and row != self._free[i - 1] + 1:
                start = i
            if i - start + 1 == count:
                return start
        return 0
