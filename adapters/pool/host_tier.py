"""Keeps validated adapters in host memory, so that returning to the device costs a copy and no disk read."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from adapters.artifact import Adapter
from adapters.pool.packed import nbytes_of
from adapters.pool.pinned_buffer import PinnedBuffer


class HostTier:
    """An LRU cache of adapters by digest, bounded in bytes. Not thread-safe: its owner locks.

    An adapter is added in two steps, so the owner can copy it without holding the lock. Only one thread may
    do so, and it waits for its copies to the device. So memory that is freed while the device reads it is not
    overwritten before that read is done.

    Args:
        capacity: bytes of weights. An adapter larger than that is not kept.
        pinned: memory for the pairs, if the device is a GPU.
    """

    def __init__(self, capacity: int, pinned: PinnedBuffer | None = None) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._pinned = pinned
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._reserved: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> Adapter | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def reserve(self, adapter: Adapter) -> Tensor | None:
        """Reserve room and evict others for it.

        Returns memory for the packed pairs if there is a pinned buffer.
        """
        digest, nbytes = adapter.info.digest, adapter.info.nbytes
        if nbytes > self.capacity or digest in self._reserved:
            return None
        self._reserved[digest] = nbytes
        self.nbytes += nbytes
        while self.nbytes > self.capacity:
            self._drop_oldest()
        return None if self._pinned is None else self._take(self._pinned, digest, nbytes_of(adapter.weights))

    def put(self, adapter: Adapter) -> None:
        """Add the adapter, if its room is still reserved."""
        if adapter.info.digest in self._reserved:
            self._adapters[adapter.info.digest] = adapter

    def drop(self, digest: str) -> None:
        """Remove the adapter, or cancel its reservation."""
        self._adapters.pop(digest, None)
        self.nbytes -= self._reserved.pop(digest, 0)
        if self._pinned is not None:
            self._pinned.free(digest)

    def _take(self, pinned: PinnedBuffer, digest: str, nbytes: int) -> Tensor | None:
        while (memory := pinned.allocate(digest, nbytes)) is None and self._adapters:
            self._drop_oldest()
        return memory

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._adapters)))
