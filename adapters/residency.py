"""Decides which adapters are on the device: loading, LRU eviction, pins, and the queue for room.

    disk ──load (checked, digest compared)──> host tier (bounded bytes) ──copy──> rank pool (bounded rows)

``pin`` never blocks. It returns a slot, or it starts the load on a thread of this module and returns None. So
a cold adapter delays only its own requests. A pinned adapter stays until it is unpinned as often as it was
pinned.

A caller of ``pin`` is an *asker* until its ``pin`` succeeds or raises, or it cancels. A loaded adapter
stays until one of its askers has pinned it. If loading fails, only the askers of that time get the error.

If every row is pinned, the adapter waits in a queue as a *claim*, as long as it has askers. For the first
claim the cheapest sufficient set of residents is *closed*: they are still served, but accept no new pins. So
they drain and the claim gets their rows. Otherwise popular adapters would be pinned again forever, and a cold
one would starve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from adapters.artifact import Adapter
from adapters.errors import AdapterError, AdapterInvalid, AdapterOutOfMemory, AdapterTooLarge
from adapters.pool.host_tier import HostTier
from adapters.pool.pinned_buffer import pinned_buffer
from adapters.pool.rank_pool import EXTRAS, RankPool, needs_of
from adapters.registry import Version
from adapters.transfer import Copying, copying_for

log = logging.getLogger("manylora.adapters")

Tier = Literal["device", "host", "disk"]

MAX_LOADS = 4
"""How many loads may be running or queued. More would only evict each other from the host tier."""


@dataclass(slots=True)
class _Resident:
    """A resident adapter. ``fresh``: not pinned since it was loaded."""

    slot: int
    needs: Mapping[str, int]
    fresh: bool = True
    pins: int = 0
    retired: bool = False


@dataclass(slots=True)
class ResidencyStats:
    """Counters that only grow."""

    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0


class Residency:
    """Decides which adapters are in the rank pool and in the host tier. Thread-safe.

    Args:
        pool: the device rows.
        load: reads and checks a version's weights from disk; raises ``AdapterError``.
        host_bytes: bound of the host tier.
        on_change: called when a ``pin`` that returned None may now succeed or raise; on any thread.
        clock: monotonic seconds.
        copying: the context in which the loader copies; None = the one for the pool's device.
    """

    def __init__(
        self,
        pool: RankPool,
        load: Callable[[Version], Adapter],
        host_bytes: int,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        copying: Copying | None = None,
    ) -> None:
        self.pool = pool
        self.host = HostTier(host_bytes, pinned_buffer(host_bytes, pool.device))
        self._copying = copying or copying_for(pool.device)
        self.stats = ResidencyStats()
        self._load = load
        self.on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._device: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: set[str] = set()
        self._unwanted: set[str] = set()  # forgotten while loading
        self._askers: dict[str, dict[Hashable, Version]] = {}  # the version that each asker wants, by digest
        self._claims: OrderedDict[str, Mapping[str, int]] = OrderedDict()  # what each claim needs
        self._closed: set[str] = set()
        self._errors: dict[Hashable, AdapterError] = {}  # by asker
        # One thread copies. More OpenMP workers than cores would make all of them sleep between regions.
        self._loader = ThreadPoolExecutor(1, "adapter-loader", torch.set_num_threads, (1,))

    def pin(self, version: Version, asker: Hashable = None) -> int | None:
        """Pins the adapter and returns its slot. None means not yet: ask again on the next step.

        Args:
            asker: the caller. None = the version itself, for callers that ask until they have it.

        Raises:
            AdapterError: loading failed. The next ``pin`` tries again.
        """
        asker = version if asker is None else asker
        with self._lock:
            resident = self._ready(version, asker)
            if resident is None:
                return None
            resident.pins += 1
            resident.retired = resident.fresh = False
            self._device.move_to_end(version.digest)
            self._forget_asker(version.digest, asker)
            return resident.slot

    def prepare(self, version: Version, asker: Hashable) -> bool:
        """Whether ``pin`` would succeed now. If not, starts what is needed. Raises like ``pin``."""
        with self._lock:
            return self._ready(version, asker) is not None

    def cancel(self, digest: str, asker: Hashable) -> None:
        """Drop the request of ``asker``. Has no effect if it did not ask."""
        with self._lock:
            self._forget_asker(digest, asker)

    def unpin(self, digest: str) -> None:
        with self._lock:
            resident = self._device[digest]
            resident.pins -= 1
            assert resident.pins >= 0, "unpinned more often than pinned"
            if resident.pins == 0 and resident.retired:
                self._evict(digest)

    def forget(self, digest: str) -> None:
        """No name uses ``digest`` any more. Frees its host copy now and its rows with the last pin."""
        with self._lock:
            self.host.drop(digest)
            self._claims.pop(digest, None)
            if digest in self._loading:
                self._unwanted.add(digest)
            resident = self._device.get(digest)
            if resident is None:
                return
            resident.retired = True
            if resident.pins == 0:
                self._evict(digest)

    def tier(self, digest: str) -> Tier:
        with self._lock:
            if digest in self._device:
                return "device"
            return "host" if digest in self.host else "disk"

    @property
    def pins(self) -> int:
        with self._lock:
            return sum(resident.pins for resident in self._device.values())

    def close(self) -> None:
        """Finishes the current load and starts no other."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Assert that the records and the pool agree (for tests)."""
        with self._lock:
            self.pool.check_integrity()
            assert self._closed <= set(self._device), "a closed adapter is not resident"
            if self._loading:
                return
            used = sum(sum(resident.needs.values()) for resident in self._device.values())
            assert used == self.pool.rows_used + self.pool.extras.used, "room taken without a resident"

    # -- the queue for room (the lock is held) ----------------------------------------------------

    def _ready(self, version: Version, asker: Hashable) -> _Resident | None:
        """The resident, if it may be pinned now. Otherwise ``asker`` is recorded."""
        error = self._errors.pop(asker, None)
        if error is not None:
            self._forget_asker(version.digest, asker)
            raise error
        self._settle()
        resident = self._device.get(version.digest)
        if resident is not None and version.digest not in self._closed:
            return resident
        self._askers.setdefault(version.digest, {})[asker] = version
        self._want(version)
        return None

    def _forget_asker(self, digest: str, asker: Hashable) -> None:
        self._errors.pop(asker, None)
        askers = self._askers.get(digest)
        if askers is None:
            return
        askers.pop(asker, None)
        if not askers:
            del self._askers[digest]
            self._claims.pop(digest, None)

    def _want(self, version: Version) -> None:
        """Starts loading ``version``, or puts it into the queue."""
        digest = version.digest
        if digest in self._loading:
            return
        needs = self._claims.get(digest)
        if needs is not None:
            if digest != self._first_claim() or not self._fits(needs):
                return
        elif digest in self._device:  # closed for the first claim: queue behind it
            self._claims[digest] = needs_of(version.info)
            return
        elif len(self._loading) + len(self._claims) >= MAX_LOADS:
            return
        self._loading.add(digest)
        self._loader.submit(self._bring, version)

    def _settle(self) -> None:
        """Drops satisfied claims, and chooses again which residents must drain for the first claim."""
        if not self._claims:
            self._closed = set()
            return
        first = self._first_claim()
        self._closed = self._who_must_drain(self._claims[first]) if first else set()
        for digest in [d for d in self._claims if d in self._device and d not in self._closed]:
            del self._claims[digest]

    def _first_claim(self) -> str | None:
        return next((digest for digest in self._claims if digest not in self._device), None)

    def _who_must_drain(self, needs: Mapping[str, int]) -> set[str]:
        """The residents with the fewest pins, as many as are needed for ``needs``.

        Residents that wait for their first pin are left out, because closing them would waste a load. If the
        others are not enough, none is closed while those wait.
        """
        missing = self.pool.missing(needs)
        chosen: set[str] = set()
        used = [(d, r) for d, r in self._device.items() if not self._is_awaited(d, r)]
        for digest, resident in sorted(used, key=lambda item: item[1].pins):
            if not missing:
                break
            chosen.add(digest)
            missing = _less(missing, resident.needs)
        return chosen if not missing else set()

    def _evictable(self) -> list[str]:
        """The residents that may be evicted, least recently used first."""
        return [d for d, r in self._device.items() if r.pins == 0 and not self._is_awaited(d, r)]

    def _is_awaited(self, digest: str, resident: _Resident) -> bool:
        return resident.fresh and digest in self._askers

    def _fits(self, needs: Mapping[str, int]) -> bool:
        missing = self.pool.missing(needs)
        for digest in self._evictable():
            missing = _less(missing, self._device[digest].needs)
        return not missing

    def _reserve(self, needs: Mapping[str, int]) -> int | None:
        """Reserves room for ``needs`` and evicts as many as needed.

        None, without evictions, if it is not enough.
        """
        if not self._fits(needs):
            return None
        for digest in self._evictable():
            if not self.pool.missing(needs):
                break
            self._evict(digest)
            self.stats.evictions += 1
        return self.pool.reserve(needs)

    def _evict(self, digest: str) -> None:
        self.pool.free(self._device.pop(digest).slot)
        self._closed.discard(digest)

    # -- the loader's thread ----------------------------------------------------------------------

    def _bring(self, version: Version) -> None:
        """Loads from disk to host to device. Otherwise records a claim or an error."""
        began = self._clock()
        try:
            if version.digest not in self._askers:  # all askers have left since
                return
            if self._to_device(version, self._to_host(version)):
                self.stats.loads += 1
                self.stats.load_seconds += self._clock() - began
        except AdapterError as error:
            self._fail(version, error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            log.warning("memory ran out while adapter %s was loaded: %s", version.name, error)
            self._fail(
                version,
                AdapterOutOfMemory(
                    f"Memory ran out while adapter {version.name!r} was loaded; try again later. If this "
                    "happens often, give the server less: lower --gpu-memory-utilization, --max-loras or "
                    "--lora-host-memory."
                ),
            )
        except Exception as error:
            log.exception("loading adapter %s raised", version.name)
            self._fail(version, AdapterInvalid(f"Adapter {version.name!r} could not be loaded: {error}"))
        finally:
            with self._lock:
                self._loading.discard(version.digest)
                if version.digest in self._unwanted:
                    self._unwanted.discard(version.digest)
                    self.forget(version.digest)
            self.on_change()

    def _fail(self, version: Version, error: AdapterError) -> None:
        with self._lock:
            self._claims.pop(version.digest, None)
            for asker, asked in self._askers.get(version.digest, {}).items():
                if asked is version:
                    self._errors[asker] = error

    def _to_host(self, version: Version) -> Adapter:
        with self._lock:
            kept = self.host.get(version.digest)
        if kept is not None:
            return kept
        with self._copying():  # DoRA reads the base's weights on the device
            adapter = self._load(version)
        needs = needs_of(adapter.info)
        if needs.get(EXTRAS, 0) > self.pool.extras.capacity:
            raise AdapterTooLarge(
                f"Adapter {version.name!r} has {needs[EXTRAS]} bytes besides its rank rows, but the device "
                f"holds {self.pool.extras.capacity} of such; raise --lora-extra-memory."
            )
        if not self.pool.could_ever_fit(needs):
            raise AdapterTooLarge(
                f"Adapter {version.name!r} has rank {adapter.info.rank}, but the device pool has "
                f"{self.pool.num_rows} rows; raise --lora-pool-rows."
            )
        return self._keep(adapter)

    def _keep(self, adapter: Adapter) -> Adapter:
        """Puts it into the host tier if there is room.

        The copy is made outside the lock: it takes milliseconds.
        """
        with self._lock:
            memory = self.host.reserve(adapter)
        try:
            adapter = self.pool.host_form(adapter, memory)
        except BaseException:
            with self._lock:
                self.host.drop(adapter.info.digest)
            raise
        with self._lock:
            self.host.put(adapter)
        return adapter

    def _to_device(self, version: Version, adapter: Adapter) -> bool:
        needs, digest = needs_of(adapter.info), version.digest
        with self._lock:
            slot = self._reserve(needs)
            if slot is None:
                if digest in self._askers:
                    self._claims.setdefault(digest, needs)
                return False
        try:
            with self._copying():
                self.pool.write(slot, adapter)
        except BaseException:
            with self._lock:
                self.pool.free(slot)
            raise
        with self._lock:
            self._claims.pop(digest, None)
            self._device[digest] = _Resident(slot, needs)
        return True


def _less(missing: Mapping[str, int], freed: Mapping[str, int]) -> dict[str, int]:
    """What is still missing after ``freed`` is freed."""
    return {name: n - freed.get(name, 0) for name, n in missing.items() if n > freed.get(name, 0)}
