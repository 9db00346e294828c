"""Checked adapters kept in host memory, so that coming back to the device costs a copy and no disk."""

from __future__ import annotations

from collections import OrderedDict

from adapters.artifact import Adapter


class HostTier:
    """Least-recently-used adapters by digest, bounded in bytes. Not thread-safe: its owner locks.

    Args:
        capacity: bytes of weights kept; an adapter larger than that is simply not kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> Adapter | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: Adapter) -> None:
        if adapter.info.nbytes > self.capacity or adapter.info.digest in self._adapters:
            return
        self._adapters[adapter.info.digest] = adapter
        self.nbytes += adapter.info.nbytes
        while self.nbytes > self.capacity:
            self.drop(next(iter(self._adapters)))

    def drop(self, digest: str) -> None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.nbytes -= adapter.info.nbytes
