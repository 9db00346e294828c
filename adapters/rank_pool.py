"""Device memory for adapters, in rank rows.

For each site there are two pools, A [rows, in_features] and B [rows, out_features]. An adapter of rank r
at that site owns r rows of both; its slot's row table says which. So a mix of ranks, per-layer ranks and
absent sites cost exactly what they are. The adapter's scale is already folded into B.

This file moves rows in and out. Who may stay is decided in ``residency.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.artifact import Adapter, LoraWeights
from adapters.native.structs import LoraSite
from adapters.rows import RowAllocator
from adapters.sites import Site

IntArray = npt.NDArray[np.integer[Any]]

Rows = slice | Tensor
"""Rows of one adapter at one site: a slice where they are neighbours, else an int64 index [r]."""


class SitePool:
    """One site's rows.

    Attributes:
        a: [rows, in_features].
        b: [rows, out_features].
        rows: by slot, for the adapters that add to this site.
        native: the same for the native kernels (``LoraSite`` in native.h), kept up to date in place.
    """

    def __init__(self, site: Site, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.a = torch.empty(num_rows, site.in_features, dtype=dtype, device=device)
        self.b = torch.empty(num_rows, site.out_features, dtype=dtype, device=device)
        self.rows: dict[int, Rows] = {}
        self.allocator = RowAllocator(num_rows)
        self._lists: dict[int, IntArray] = {}
        self._tables: list[tuple[IntArray, IntArray]] = []
        self.native = LoraSite(self.a.data_ptr(), self.b.data_ptr(), site.in_features, site.out_features)
        self._make_tables(slots=16)

    def write(self, slot: int, rows: list[int], weights: LoraWeights) -> None:
        index = _as_rows(rows, self.a.device)
        self.a[index] = weights.a.to(self.a.device)
        self.b[index] = weights.b.to(self.b.device)
        self.rows[slot] = index
        addresses, ranks = self._tables[-1]
        self._lists[slot] = np.array(rows, dtype=np.int32)
        addresses[slot] = self._lists[slot].ctypes.data
        ranks[slot] = len(rows)

    def hold(self, slot: int) -> None:
        """Give ``slot`` a place in the native tables: kernels look up every slot at every site."""
        while slot >= len(self._tables[-1][1]):
            self._make_tables(slots=2 * len(self._tables[-1][1]))

    def free(self, slot: int, rows: list[int]) -> None:
        self.rows.pop(slot, None)
        self._tables[-1][1][slot] = 0
        self._lists.pop(slot, None)
        self.allocator.give(rows)

    def _make_tables(self, slots: int) -> None:
        """Larger tables; the old ones stay, since a kernel may be reading them right now."""
        addresses, ranks = np.zeros(slots, np.int64), np.zeros(slots, np.int32)
        if self._tables:
            before = self._tables[-1]
            addresses[: len(before[0])], ranks[: len(before[1])] = before
        self._tables.append((addresses, ranks))
        self.native.rows, self.native.ranks = addresses.ctypes.data, ranks.ctypes.data


class RankPool:
    """All sites' pools, and the slots of the adapters in them.

    ``reserve`` takes rows (bookkeeping only); ``write`` copies the weights into them, and may run on another
    thread than the model, since no running batch reads rows that were just reserved; ``free`` returns them.
    """

    def __init__(
        self, sites: Mapping[str, Site], num_rows: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_rows = num_rows
        self.sites = {
            name: SitePool(site, num_rows, dtype, torch.device(device)) for name, site in sites.items()
        }
        self._owned: dict[int, dict[str, list[int]]] = {}
        self._bytes_per_row = {
            name: (site.in_features + site.out_features) * dtype.itemsize for name, site in sites.items()
        }

    @property
    def rows_total(self) -> int:
        return self.num_rows * len(self.sites)

    @property
    def rows_used(self) -> int:
        """Counted in the allocators, which any thread may read while another loads an adapter."""
        return self.rows_total - sum(pool.allocator.num_free for pool in self.sites.values())

    @property
    def bytes_total(self) -> int:
        return self.num_rows * sum(self._bytes_per_row.values())

    def could_ever_fit(self, ranks: Mapping[str, int]) -> bool:
        return all(rank <= self.num_rows for rank in ranks.values())

    def missing_rows(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """By site, how many rows are lacking for an adapter of these ranks (empty = it fits now)."""
        lacking = {name: rank - self.sites[name].allocator.num_free for name, rank in ranks.items()}
        return {name: rows for name, rows in lacking.items() if rows > 0}

    def reserve(self, ranks: Mapping[str, int]) -> int | None:
        """Take rows for an adapter of these ranks; its new slot, or None if some site lacks rows."""
        if self.missing_rows(ranks):
            return None
        slot = next(i for i in range(len(self._owned) + 1) if i not in self._owned)
        for pool in self.sites.values():
            pool.hold(slot)
        owned: dict[str, list[int]] = {}
        for name, rank in ranks.items():
            rows = self.sites[name].allocator.take(rank)
            assert rows is not None
            owned[name] = rows
        self._owned[slot] = owned
        return slot

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy ``adapter``'s weights into the rows of ``slot``."""
        for name, rows in self._owned[slot].items():
            self.sites[name].write(slot, rows, adapter.weights[name])

    def free(self, slot: int) -> None:
        for name, rows in self._owned.pop(slot).items():
            self.sites[name].free(slot, rows)

    def check_integrity(self) -> None:
        """Assert that every row is free or owned once (for tests)."""
        for name, pool in self.sites.items():
            pool.allocator.check_integrity([owned[name] for owned in self._owned.values() if name in owned])
            assert set(pool.rows) <= set(self._owned), f"{name} has rows of a slot that is gone"


def _as_rows(rows: list[int], device: torch.device) -> Rows:
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
