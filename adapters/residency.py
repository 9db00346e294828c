"""Decides which adapters are on the device: loading, eviction, pins.

    disk ──load (checked, digest compared)──> host tier (bounded bytes) ──copy──> rank pool (bounded rows)

``pin`` never blocks. It returns a slot, or it starts the load on a thread of this module and returns None. So
a cold adapter delays only its own requests. A pinned adapter stays until it is unpinned as often as it was
pinned.

A caller of ``pin`` is a *requester* until its ``pin`` succeeds or raises, or it cancels. A loaded adapter
stays until one of its requesters has pinned it. If loading fails, only the requesters of that time get the
error. If every row is pinned, the adapter waits in the queue of ``residents.py``, as long as it has
requesters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters.artifact import Adapter
from adapters.errors import AdapterError, AdapterInvalid, AdapterOutOfMemory, AdapterTooLarge
from adapters.events import Tier, event_fields
from adapters.pool.host_tier import HostTier
from adapters.pool.pinned_buffer import pinned_buffer
from adapters.pool.rank_pool import EXTRAS, RankPool, needs_of
from adapters.pool.residents import Residents
from adapters.registry import Version
from adapters.transfer import Copying, copying_for

log = logging.getLogger("manylora.adapters")

MAX_LOADS = 4
"""How many loads may be running or queued. More would only evict each other from the host tier."""


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
        self._loads, self._load_seconds = 0, 0.0
        self._load = load
        self.on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._requesters: dict[str, dict[Hashable, Version]] = {}  # the version that each wants, by digest
        self._residents = Residents(pool, self._requesters.__contains__)
        self._loading: set[str] = set()
        self._unwanted: set[str] = set()  # forgotten while loading
        self._errors: dict[Hashable, AdapterError] = {}  # by requester
        # One thread copies. More OpenMP workers than cores would make all of them sleep between regions.
        self._loader = ThreadPoolExecutor(1, "adapter-loader", torch.set_num_threads, (1,))

    def pin(self, version: Version, requester: Hashable = None) -> int | None:
        """Pins the adapter and returns its slot. None means not yet: call it again on the next step.

        Args:
            requester: the caller. None = the version itself, for callers that repeat the call until they
                have it.

        Raises:
            AdapterError: loading failed. The next ``pin`` tries again.
        """
        requester = version if requester is None else requester
        with self._lock:
            if not self._ready(version, requester):
                return None
            self._forget_requester(version.digest, requester)
            return self._residents.pin(version.digest)

    def prepare(self, version: Version, requester: Hashable) -> bool:
        """Whether ``pin`` would succeed now. If not, starts what is needed. Raises like ``pin``."""
        with self._lock:
            return self._ready(version, requester)

    def cancel(self, digest: str, requester: Hashable) -> None:
        """``requester`` no longer wants the adapter. Has no effect if it did not request it."""
        with self._lock:
            self._forget_requester(digest, requester)

    def unpin(self, digest: str) -> None:
        with self._lock:
            resident = self._residents[digest]
            resident.pins -= 1
            assert resident.pins >= 0, "unpinned more often than pinned"
            if resident.pins == 0 and resident.retired:
                self._residents.evict(digest)

    def forget(self, digest: str) -> None:
        """No name uses ``digest`` any more. Frees its host copy now and its rows with the last pin."""
        with self._lock:
            self.host.drop(digest)
            self._residents.dequeue(digest)
            if digest in self._loading:
                self._unwanted.add(digest)
            resident = self._residents.get(digest)
            if resident is None:
                return
            resident.retired = True
            if resident.pins == 0:
                self._residents.evict(digest)

    def tier(self, digest: str) -> Tier:
        with self._lock:
            if digest in self._residents:
                return "device"
            return "host" if digest in self.host else "disk"

    @property
    def pins(self) -> int:
        with self._lock:
            return self._residents.pins

    @property
    def stats(self) -> ResidencyStats:
        return ResidencyStats(self._loads, self._load_seconds, self._residents.evictions)

    def close(self) -> None:
        """Finishes the current load and starts no other."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Assert that the records and the pool agree (for tests)."""
        with self._lock:
            self._residents.check_integrity(loading=bool(self._loading))

    # -- requesters (the lock is held) ------------------------------------------------------------

    def _ready(self, version: Version, requester: Hashable) -> bool:
        """Whether the adapter may be pinned now. If not, ``requester`` is recorded."""
        error = self._errors.pop(requester, None)
        if error is not None:
            self._forget_requester(version.digest, requester)
            raise error
        if self._residents.available(version.digest) is not None:
            return True
        self._requesters.setdefault(version.digest, {})[requester] = version
        self._request(version)
        return False

    def _forget_requester(self, digest: str, requester: Hashable) -> None:
        self._errors.pop(requester, None)
        requesters = self._requesters.get(digest)
        if requesters is None:
            return
        requesters.pop(requester, None)
        if not requesters:
            del self._requesters[digest]
            self._residents.dequeue(digest)

    def _request(self, version: Version) -> None:
        """Starts loading ``version``, or puts it into the queue for room."""
        digest = version.digest
        if digest in self._loading:
            return
        if self._residents.is_queued(digest):
            if not self._residents.is_next(digest):
                return
        elif digest in self._residents:  # it drains for the first one in the queue, so it waits behind that
            self._residents.enqueue(digest, needs_of(version.info))
            return
        elif len(self._loading) + self._residents.queued >= MAX_LOADS:
            return
        self._loading.add(digest)
        self._loader.submit(self._run_load, version)

    # -- the loader's thread ----------------------------------------------------------------------

    def _run_load(self, version: Version) -> None:
        """Loads from disk to host to device. Otherwise queues the adapter or records an error."""
        began = self._clock()
        try:
            if version.digest not in self._requesters:  # all requesters have cancelled since
                return
            if self._to_device(version, self._to_host(version)):
                self._loads += 1
                self._load_seconds += self._clock() - began
        except AdapterError as error:
            self._fail(version, error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            log.warning("adapter not loaded: memory ran out", extra=self._event(version, reason=str(error)))
            self._fail(version, _out_of_memory(version))
        except Exception as error:
            log.exception("adapter not loaded", extra=self._event(version))
            self._fail(version, AdapterInvalid(f"Adapter {version.name!r} could not be loaded: {error}"))
        finally:
            with self._lock:
                self._loading.discard(version.digest)
                if version.digest in self._unwanted:
                    self._unwanted.discard(version.digest)
                    self.forget(version.digest)
            self.on_change()

    def _event(self, version: Version, **more: object) -> dict[str, object]:
        return event_fields(version.name, version, self.tier(version.digest), **more)

    def _fail(self, version: Version, error: AdapterError) -> None:
        with self._lock:
            self._residents.dequeue(version.digest)
            for requester, requested in self._requesters.get(version.digest, {}).items():
                if requested is version:
                    self._errors[requester] = error

    def _to_host(self, version: Version) -> Adapter:
        with self._lock:
            kept = self.host.get(version.digest)
        if kept is not None:
            return kept
        with self._copying():  # DoRA reads the base's weights on the device
            adapter = self._load(version)
        self._check_size(version, adapter)
        return self._add_to_host(adapter)

    def _check_size(self, version: Version, adapter: Adapter) -> None:
        """Raises AdapterTooLarge if the adapter does not fit into an empty pool."""
        needs = needs_of(adapter.info)
        if needs.get(EXTRAS, 0) > self.pool.extras.capacity:
            raise AdapterTooLarge(
                f"Adapter {version.name!r} needs {needs[EXTRAS]} bytes besides its rank rows, but the device "
                f"has {self.pool.extras.capacity} bytes for them; raise --lora-extra-memory."
            )
        if not self.pool.could_ever_fit(needs):
            raise AdapterTooLarge(
                f"Adapter {version.name!r} has rank {adapter.info.rank}, but the device pool has "
                f"{self.pool.num_rows} rows; raise --lora-pool-rows."
            )

    def _add_to_host(self, adapter: Adapter) -> Adapter:
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
            slot = self._residents.reserve(needs)
            if slot is None:
                if digest in self._requesters:
                    self._residents.enqueue(digest, needs)
                return False
        try:
            with self._copying():
                self.pool.write(slot, adapter)
        except BaseException:
            with self._lock:
                self.pool.free(slot)
            raise
        with self._lock:
            self._residents.add(digest, slot, needs)
        return True


def _out_of_memory(version: Version) -> AdapterOutOfMemory:
    return AdapterOutOfMemory(
        f"Memory ran out while adapter {version.name!r} was loaded; try again later. If this happens often, "
        "lower --gpu-memory-utilization, --max-loras or --lora-host-memory."
    )
