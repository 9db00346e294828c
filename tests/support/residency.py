"""A residency with fakes: invented adapters, a disk that counts reads, and a clock that tests set."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.errors import AdapterError
from adapters.pool.host_tier import HostTier
from adapters.pool.packed import packed
from adapters.pool.pinned_buffer import PinnedBuffer
from adapters.pool.rank_pool import RankPool
from adapters.registry import Version
from adapters.residency import Residency
from adapters.sites import Site

SITES = {"q": Site("q", 4, 4), "v": Site("v", 4, 4)}
NBYTES = 1000


def make_version(name: str, rank: int = 4, extra_bytes: int = 0) -> Version:
    info = AdapterInfo(f"digest-{name}", {"q": rank}, NBYTES, None, (), extra_bytes)
    return Version(name, info.digest, Path(name), info, 0.0)


def value_of(version: Version) -> float:
    """The value of all weights of an adapter."""
    return float(sum(map(ord, version.name)))


class Pool(RankPool):
    """Keeps adapters packed, as for a GPU. It writes them only at the end of the stream's block."""

    def __init__(self, rows: int) -> None:
        super().__init__(SITES, rows, torch.float32, extra_bytes=100)
        self.events: list[str] = []
        self.fault: BaseException | None = None
        self._queued: list[tuple[int, Adapter]] | None = None

    def host_form(self, adapter: Adapter, memory: torch.Tensor | None) -> Adapter:
        return packed(adapter, memory)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._queued = []
        yield
        for slot, adapter in self._queued:
            assert self.rows_used > 0, "its rows must be reserved"
            super().write(slot, adapter)
            self.events.append(f"{adapter.info.digest} is written")
        self._queued = None

    def write(self, slot: int, adapter: Adapter) -> None:
        if self.fault is not None:
            raise self.fault
        assert self._queued is not None, "adapters must not be written on the steps' stream"
        self._queued.append((slot, adapter))


class World:
    """A residency with a pool of ``rows``, a disk that counts reads, and a clock that tests set.

    ``like_gpu``: the host tier has a pinned buffer, and copies use a stream.
    """

    def __init__(self, rows: int = 8, host_adapters: int = 3, like_gpu: bool = False) -> None:
        self.now = 0.0
        self.reads: list[str] = []
        self.broken: dict[str, AdapterError] = {}
        self.weights: list[weakref.ref[torch.Tensor]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pool = Pool(rows) if like_gpu else RankPool(SITES, rows, torch.float32, extra_bytes=100)
        copying = self.pool.stream if isinstance(self.pool, Pool) else None
        host_bytes = host_adapters * NBYTES
        self.residency = Residency(self.pool, self._load, host_bytes, lambda: None, lambda: self.now, copying)
        if like_gpu:
            self.pinned = PinnedBuffer(torch.empty(host_bytes // 4, dtype=torch.uint8))
            self.residency.host = HostTier(host_bytes, self.pinned)

    def _load(self, version: Version) -> Adapter:
        assert self.gate.wait(10)
        self.reads.append(version.name)
        if version.name in self.broken:
            raise self.broken[version.name]
        ranks, value = version.info.ranks, value_of(version)
        weights = {
            s: LoraWeights(torch.full((r, 4), value), torch.full((r, 4), value)) for s, r in ranks.items()
        }
        adapter = Adapter(version.info, weights)
        self.weights += [weakref.ref(pair.a) for pair in weights.values()]
        return adapter

    def settled(self) -> None:
        """Wait until the loader has nothing to do."""
        deadline = time.monotonic() + 10
        while self.residency._loading:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def pin(self, version: Version) -> int:
        """Wait until the adapter is loaded, and pin it."""
        for _ in range(3):
            slot = self.residency.pin(version)
            if slot is not None:
                return slot
            self.settled()
        raise AssertionError(f"{version.name} does not become resident")

    def touch(self, version: Version) -> None:
        self.pin(version)
        self.residency.unpin(version.digest)
