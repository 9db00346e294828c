"""One site's rank rows on the device, and the adapters' adjustments of the base's output there.

The tables for torch, for the native kernels and for GPU kernels are all kept up to date.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.artifact import Adjustment, LoraWeights
from adapters.kernels.cpu.structs import LoraSite
from adapters.pool.row_allocator import RowAllocator
from adapters.pool.slot_records import Record, SlotRecords
from adapters.sites import Site
from adapters.transfer import send_coalesced

IntArray = npt.NDArray[np.integer[Any]]

Rows = slice | Tensor
"""Rows of one adapter at one site: a slice if they are adjacent, else an int32 index [r]."""


class SitePool:
    """One site's rows.

    Args:
        a: [rows, in_features].
        b: [rows, out_features].
        max_rank: the most rows that an adapter may have here.
        records: the records of a group of sites. This site is ``number`` among them.

    Attributes:
        rows: by slot, for the adapters that add to this site.
        adjustments: by slot, for the adapters that change the base's output here.
        native: the same for the native kernels (``LoraSite`` in native.h), updated in place.
        device_site: the same for GPU kernels (a row of ``SlotRecords.sites``), as of the last
            ``SlotRecords.write``.
    """

    def __init__(self, a: Tensor, b: Tensor, max_rank: int, records: SlotRecords, number: int) -> None:
        self.a, self.b = a, b
        self.max_rank = max_rank
        self.rows: dict[int, Rows] = {}
        self.adjustments: dict[int, Adjustment] = {}
        self.allocator = RowAllocator(len(a))
        self._records = records
        self.device_site = records.place(number, a, b)
        self._index: dict[int, Tensor] = {}
        self._lists: dict[int, IntArray] = {}
        self._tables: list[tuple[IntArray, ...]] = []
        self.native = LoraSite(a.data_ptr(), b.data_ptr(), a.shape[1], b.shape[1])
        self._make_tables(slots=16)

    def adjust(self, slot: int, adjustment: Adjustment) -> None:
        """Set the slot's adjustment of the base's output. Its vectors are on the device."""
        vectors = (adjustment.scale, adjustment.shift)
        self.adjustments[slot] = adjustment
        self._tables[-1][2][slot] = [0 if vector is None else vector.data_ptr() for vector in vectors]

    def write(self, slot: int, rows: list[int], weights: LoraWeights) -> None:
        """Copy a pair into ``rows``, at least one row."""
        array = np.array(rows, np.int32)
        self.assign(slot, array, *send_coalesced([torch.from_numpy(array)], self.a.device))
        index = self.rows[slot]
        self.a[index] = weights.a.to(self.a.device)
        self.b[index] = weights.b.to(self.b.device)

    def assign(self, slot: int, rows: IntArray, index: Tensor) -> None:
        """Assign ``rows`` (int32) to the slot. ``index`` is the same array on the device."""
        assert len(rows) <= self.max_rank
        adjacent = rows[-1] - rows[0] + 1 == len(rows)
        self.rows[slot] = slice(int(rows[0]), int(rows[-1]) + 1) if adjacent else index
        self._index[slot], self._lists[slot] = index, rows
        addresses, ranks, _ = self._tables[-1]
        addresses[slot] = rows.ctypes.data
        ranks[slot] = len(rows)

    def record(self, slot: int) -> Record:
        """The slot's record for GPU kernels."""
        index, adjustment = self._index.get(slot), self.adjustments.get(slot)
        scale, shift = (None, None) if adjustment is None else (adjustment.scale, adjustment.shift)
        rows, scales, shifts = (0 if part is None else part.data_ptr() for part in (index, scale, shift))
        return rows, 0 if index is None else len(index), scales, shifts

    def send(self, slot: int) -> None:
        """Write the slot's record for GPU kernels.

        Only for a lone site, which shares its records with no other.
        """
        self._records.write(slot, [self.record(slot)])

    def ensure_slot(self, slot: int) -> None:
        """Make room for ``slot`` in the kernels' tables. Kernels look up every slot at every site."""
        while slot >= len(self._tables[-1][1]):
            self._make_tables(slots=2 * len(self._tables[-1][1]))

    def free(self, slot: int, rows: list[int]) -> None:
        self.rows.pop(slot, None)
        self.adjustments.pop(slot, None)
        self._tables[-1][1][slot] = 0
        self._tables[-1][2][slot] = 0
        self._lists.pop(slot, None)
        self._index.pop(slot, None)
        self.allocator.free(rows)

    def _make_tables(self, slots: int) -> None:
        """Make larger tables. Old tables are kept, because a kernel may be reading them."""
        tables: tuple[IntArray, ...] = (
            np.zeros(slots, np.int64),
            np.zeros(slots, np.int32),
            np.zeros((slots, 2), np.int64),
        )
        if self._tables:
            for table, before in zip(tables, self._tables[-1], strict=True):
                table[: len(before)] = before
        self._tables.append(tables)
        native = self.native
        native.rows, native.ranks, native.adjusts = (table.ctypes.data for table in tables)


def lone_pool(
    site: Site, num_rows: int, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
) -> SitePool:
    """A pool for one site alone, with separate memory (not initialised).

    ``max_rank``: None = ``num_rows``.
    """
    a, b = (
        torch.empty(num_rows, width, dtype=dtype, device=device)
        for width in (site.in_features, site.out_features)
    )
    return SitePool(a, b, num_rows if max_rank is None else max_rank, SlotRecords(1, device), 0)
