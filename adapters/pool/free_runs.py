"""The free numbers among 0 … ``size``-1, stored as runs. Integers only.

Taking and giving back numbers costs time by the number of runs, not by the number of integers.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable


class FreeRuns:
    """All numbers are free at first.

    Attributes:
        num_free: how many are free.
        runs: (start, stop), ascending, never adjacent and never empty.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.num_free = size
        self.runs = [(0, size)] if size else []

    def take_run(self, count: int) -> int | None:
        """Take ``count`` adjacent numbers from the lowest run that is long enough; None if no run is.

        Returns the first number.
        """
        for i, (start, stop) in enumerate(self.runs):
            if stop - start >= count:
                self._shorten(i, count)
                return start
        return None

    def take_lowest(self, count: int) -> list[int]:
        """Take the lowest ``count`` free numbers, ascending. There must be enough."""
        assert count <= self.num_free
        taken: list[int] = []
        while len(taken) < count:
            start, stop = self.runs[0]
            part = min(stop - start, count - len(taken))
            taken += range(start, start + part)
            self._shorten(0, part)
        return taken

    def free(self, start: int, stop: int) -> None:
        """Free the numbers [start, stop)."""
        if start == stop:
            return
        self.num_free += stop - start
        i = bisect(self.runs, (start, stop))
        after = self.runs[i : i + 1]
        before = self.runs[i - 1 : i] if i else []
        low = before[0][0] if before and before[0][1] == start else start
        high = after[0][1] if after and after[0][0] == stop else stop
        self.runs[i - (low < start) : i + (high > stop)] = [(low, high)]

    def check_integrity(self, taken: Iterable[tuple[int, int]]) -> None:
        """Assert that each number is either free or in one run of ``taken`` (for tests)."""
        runs = sorted([*self.runs, *(run for run in taken if run[0] < run[1])])
        ends = [0, *(stop for _, stop in runs)]
        assert [start for start, _ in runs] == ends[:-1], "numbers leaked or were given twice"
        assert ends[-1] == self._size, "the last numbers leaked"
        assert self.num_free == sum(stop - start for start, stop in self.runs), "the free ones are miscounted"
        assert all(a[1] < b[0] for a, b in zip(self.runs, self.runs[1:], strict=False)), "runs are in pieces"

    def _shorten(self, i: int, count: int) -> None:
        start, stop = self.runs[i]
        self.runs[i : i + 1] = [(start + count, stop)] if stop - start > count else []
        self.num_free -= count


def runs_of(numbers: list[int]) -> list[tuple[int, int]]:
    """Converts ascending numbers to runs."""
    ends = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    bounds = zip([0, *ends], [*ends, len(numbers)], strict=True)
    return [(numbers[first], numbers[last - 1] + 1) for first, last in bounds if first < last]
