"""Device memory for adapters' rank rows. Their extras are in ``extras_pool.py``.

Each site has two pools, A [rows, in_features] and B [rows, out_features]. An adapter of rank r at that site
owns r rows of both, and its slot's row table lists them. So mixed ranks, per-layer ranks and absent sites
need no padding. B already contains the adapter's scale.

This file moves rows in and out. ``residency.py`` decides which adapters stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from adapters.artifact import Adapter, AdapterInfo
from adapters.pool.extras_pool import ExtrasPool, moved_adjustments
from adapters.pool.packed import PackedWeights, packed
from adapters.pool.row_store import RowStore
from adapters.pool.site_pool import SitePool
from adapters.pool.slot_records import SlotRecords
from adapters.sites import Site
from adapters.transfer import send_coalesced

EXTRAS = "extras"
"""The key of an adapter's needs that holds the bytes of its ``Extras``. No site has this name."""


def row_bytes(sites: Mapping[str, Site], dtype: torch.dtype) -> int:
    """Bytes of one rank row at every site."""
    return sum(site.in_features + site.out_features for site in sites.values()) * dtype.itemsize


def needs_of(info: AdapterInfo) -> dict[str, int]:
    """What an adapter needs from the pool: rows by site, and bytes under ``EXTRAS`` if it has extras."""
    return {**info.ranks, EXTRAS: info.extra_bytes} if info.extra_bytes else dict(info.ranks)


class RankPool:
    """The pools of all sites, and the slots of the resident adapters.

    ``reserve`` takes rows (bookkeeping only). ``write`` copies the weights into them; it may run on another
    thread than the model, because no running batch reads rows that were just reserved. ``free`` returns the
    rows. No adapter has a rank above ``max_rank``, at most ``num_rows``; the kernels' memory is sized by it.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        norms: Iterable[str] = (),
        extra_bytes: int = 0,
        max_rank: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.num_rows = num_rows
        self._store = RowStore(sites, num_rows, dtype, self.device)
        self._records = SlotRecords(len(sites), self.device)
        self.max_rank = max_rank = num_rows if max_rank is None else min(max_rank, num_rows)
        self.sites = {
            name: SitePool(*self._store.pair(name, site), max_rank, self._records, number)
            for number, (name, site) in enumerate(sites.items())
        }
        self.extras = ExtrasPool(norms, extra_bytes, dtype, self.device)
        self._owned: dict[int, dict[str, list[int]]] = {}
        self.bytes_total = num_rows * row_bytes(sites, dtype)

    @property
    def rows_total(self) -> int:
        return self.num_rows * len(self.sites)

    @property
    def rows_used(self) -> int:
        """Free resources. The allocators count them, so any thread may ask while another loads an adapter."""
        return self.rows_total - sum(pool.allocator.num_free for pool in self.sites.values())

    def could_ever_fit(self, needs: Mapping[str, int]) -> bool:
        return all(need <= self._capacity(name) for name, need in needs.items())

    def missing(self, needs: Mapping[str, int]) -> dict[str, int]:
        """What is missing for these needs, in the same units. Empty means that it fits now."""
        lacking = {name: need - self._free(name) for name, need in needs.items()}
        return {name: amount for name, amount in lacking.items() if amount > 0}

    def reserve(self, needs: Mapping[str, int]) -> int | None:
        """Reserve what an adapter needs. Returns its new slot, or None if something is missing."""
        if self.missing(needs):
            return None
        slot = next(i for i in range(len(self._owned) + 1) if i not in self._owned)
        for pool in self.sites.values():
            pool.ensure_slot(slot)
        owned: dict[str, list[int]] = {}
        for name in needs.keys() - {EXTRAS}:
            rows = self.sites[name].allocator.allocate(needs[name])
            assert rows is not None
            owned[name] = rows
        self.extras.reserve(slot, needs.get(EXTRAS, 0))
        self._owned[slot] = owned
        return slot

    def host_form(self, adapter: Adapter, memory: Tensor | None) -> Adapter:
        """The adapter in the host tier's form. For a GPU it is packed, into ``memory`` if given."""
        return adapter if self.device.type == "cpu" else packed(adapter, memory)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy ``adapter``'s weights into the rows of ``slot``, on the current stream.

        The caller waits for it.
        """
        owned = self._owned[slot]
        if isinstance(adapter.weights, PackedWeights):
            self._write_packed(slot, adapter.weights)
        else:
            for name, pair in adapter.weights.items():
                self.sites[name].write(slot, owned[name], pair)
        for name, adjustment in moved_adjustments(adapter.extras.adjustments, self.device).items():
            owned.setdefault(name, [])
            self.sites[name].adjust(slot, adjustment)
        self._records.write(slot, [pool.record(slot) for pool in self.sites.values()])
        self.extras.write(slot, adapter.extras)

    def free(self, slot: int) -> None:
        for name, rows in self._owned.pop(slot).items():
            self.sites[name].free(slot, rows)
        self.extras.free(slot)

    def check_integrity(self) -> None:
        """Assert that each row is free or owned once, and that no byte is lost (for tests)."""
        for name, pool in self.sites.items():
            pool.allocator.check_integrity([owned[name] for owned in self._owned.values() if name in owned])
            held = pool.rows.keys() | pool.adjustments.keys()
            assert held <= self._owned.keys(), f"{name} has something of a slot that is gone"
        self.extras.check_integrity(self._owned.keys())

    def _write_packed(self, slot: int, weights: PackedWeights) -> None:
        rows = {name: np.array(self._owned[slot][name], np.int32) for name in weights}
        indices = send_coalesced([torch.from_numpy(array) for array in rows.values()], self.device)
        for (name, array), index in zip(rows.items(), indices, strict=True):
            self.sites[name].assign(slot, array, index)
        self._store.write(weights, rows)

    def _capacity(self, name: str) -> int:
        return self.extras.capacity if name == EXTRAS else self.num_rows

    def _free(self, name: str) -> int:
        if name == EXTRAS:
            return self.extras.capacity - self.extras.used
        return self.sites[name].allocator.num_free
