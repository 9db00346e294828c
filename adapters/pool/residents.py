"""The adapters in the rank pool, LRU eviction, and the queue of adapters that wait for room.

An adapter waits in the queue if every row that it needs is pinned. For the first one in the queue, the
cheapest sufficient set of residents is *draining*: they are still served, but accept no new pins. So their
rows become free. Otherwise popular adapters would be pinned again forever, and a cold one would starve.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapters.pool.rank_pool import RankPool


@dataclass(slots=True)
class Resident:
    """An adapter in the rank pool.

    Attributes:
        needs: what it takes of the pool, as ``needs_of`` gives it.
        fresh: whether it has not been pinned since it was loaded.
        pins: how often it is pinned now.
        retired: whether it is evicted with its last pin.
    """

    slot: int
    needs: Mapping[str, int]
    fresh: bool = True
    pins: int = 0
    retired: bool = False


class Residents:
    """The resident adapters by digest. Not thread-safe: its owner locks.

    Args:
        pool: the device rows.
        is_requested: whether someone waits to pin the adapter with that digest. A fresh resident stays until
            one of them has pinned it.

    Attributes:
        evictions: how many adapters were evicted for others.
    """

    def __init__(self, pool: RankPool, is_requested: Callable[[str], bool]) -> None:
        self.pool = pool
        self.evictions = 0
        self._is_requested = is_requested
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._queue: OrderedDict[str, Mapping[str, int]] = OrderedDict()  # what each waiting adapter needs
        self._draining: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    def __getitem__(self, digest: str) -> Resident:
        return self._residents[digest]

    def get(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    @property
    def pins(self) -> int:
        return sum(resident.pins for resident in self._residents.values())

    @property
    def queued(self) -> int:
        """The length of the queue."""
        return len(self._queue)

    def add(self, digest: str, slot: int, needs: Mapping[str, int]) -> None:
        """Record an adapter that was written to the pool."""
        self._queue.pop(digest, None)
        self._residents[digest] = Resident(slot, needs)

    def available(self, digest: str) -> Resident | None:
        """The resident, if it accepts new pins."""
        self._update_draining()
        return None if digest in self._draining else self._residents.get(digest)

    def pin(self, digest: str) -> int:
        """Pin a resident and return its slot."""
        resident = self._residents[digest]
        resident.pins += 1
        resident.retired = resident.fresh = False
        self._residents.move_to_end(digest)
        return resident.slot

    def evict(self, digest: str) -> None:
        """Free a resident's rows."""
        self.pool.free(self._residents.pop(digest).slot)
        self._draining.discard(digest)

    def is_queued(self, digest: str) -> bool:
        return digest in self._queue

    def enqueue(self, digest: str, needs: Mapping[str, int]) -> None:
        """Let an adapter wait for room. It keeps its place if it already waits."""
        self._queue.setdefault(digest, needs)

    def dequeue(self, digest: str) -> None:
        """The adapter no longer waits."""
        self._queue.pop(digest, None)

    def is_next(self, digest: str) -> bool:
        """Whether a queued adapter is the first in the queue and fits now."""
        return digest == self._first_queued() and self._fits(self._queue[digest])

    def reserve(self, needs: Mapping[str, int]) -> int | None:
        """Reserve room for ``needs``, and evict as many residents as needed. Returns the slot.

        None, without evictions, if there is not enough room.
        """
        if not self._fits(needs):
            return None
        for digest in self._evictable():
            if not self.pool.missing(needs):
                break
            self.evict(digest)
            self.evictions += 1
        return self.pool.reserve(needs)

    def check_integrity(self, loading: bool) -> None:
        """Assert that the records and the pool agree (for tests). ``loading``: a slot may be reserved."""
        self.pool.check_integrity()
        assert self._draining <= set(self._residents), "a draining adapter is not resident"
        if loading:
            return
        used = sum(sum(resident.needs.values()) for resident in self._residents.values())
        assert used == self.pool.rows_used + self.pool.extras.used, "room taken without a resident"

    def _update_draining(self) -> None:
        """Removes adapters from the queue that need not wait, and chooses the draining ones again."""
        if not self._queue:
            self._draining = set()
            return
        first = self._first_queued()
        self._draining = self._who_must_drain(self._queue[first]) if first else set()
        for digest in [d for d in self._queue if d in self._residents and d not in self._draining]:
            del self._queue[digest]

    def _first_queued(self) -> str | None:
        return next((digest for digest in self._queue if digest not in self._residents), None)

    def _who_must_drain(self, needs: Mapping[str, int]) -> set[str]:
        """The residents with the fewest pins, as many as are needed for ``needs``.

        Residents that wait for their first pin are left out, because draining them would waste a load. If the
        others are not enough, none drains while those wait.
        """
        missing = self.pool.missing(needs)
        chosen: set[str] = set()
        used = [(d, r) for d, r in self._residents.items() if not self._awaits_first_pin(d, r)]
        for digest, resident in sorted(used, key=lambda item: item[1].pins):
            if not missing:
                break
            chosen.add(digest)
            missing = _less(missing, resident.needs)
        return chosen if not missing else set()

    def _evictable(self) -> list[str]:
        """The residents that may be evicted, least recently used first."""
        return [d for d, r in self._residents.items() if r.pins == 0 and not self._awaits_first_pin(d, r)]

    def _awaits_first_pin(self, digest: str, resident: Resident) -> bool:
        return resident.fresh and self._is_requested(digest)

    def _fits(self, needs: Mapping[str, int]) -> bool:
        missing = self.pool.missing(needs)
        for digest in self._evictable():
            missing = _less(missing, self._residents[digest].needs)
        return not missing


def _less(missing: Mapping[str, int], freed: Mapping[str, int]) -> dict[str, int]:
    """What is still missing after ``freed`` is freed."""
    return {name: n - freed.get(name, 0) for name, n in missing.items() if n > freed.get(name, 0)}
