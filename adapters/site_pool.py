"""One site's rank rows on the device, and what adapters make of the base's own output there.

Kept up to date for torch and, in place, for the native kernels and those on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.artifact import Adjustment, LoraWeights
from adapters.native.structs import LoraSite
from adapters.rows import RowAllocator
from adapters.sites import Site
from adapters.slot_records import SlotRecords

IntArray = npt.NDArray[np.integer[Any]]

Rows = slice | Tensor
"""Rows of one adapter at one site: a slice where they are neighbours, else an int64 index [r]."""


class SitePool:
    """One site's rows.

    Attributes:
        a: [rows, in_features].
        b: [rows, out_features].
        rows: by slot, for the adapters that add to this site.
        adjustments: by slot, for the adapters that change the base's own output here.
        native: the same for the native kernels (``LoraSite`` in native.h), kept up to date in place.
        records: the same for kernels on a GPU, likewise.
        max_rank: no adapter has more rows here.
    """

    def __init__(
        self,
        site: Site,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rank: int | None = None,
    ) -> None:
        self.a = torch.empty(num_rows, site.in_features, dtype=dtype, device=device)
        self.b = torch.empty(num_rows, site.out_features, dtype=dtype, device=device)
        self.rows: dict[int, Rows] = {}
        self.adjustments: dict[int, Adjustment] = {}
        self.max_rank = num_rows if max_rank is None else max_rank
        self.allocator = RowAllocator(num_rows)
        self._lists: dict[int, IntArray] = {}
        self._tables: list[tuple[IntArray, ...]] = []
        self.native = LoraSite(self.a.data_ptr(), self.b.data_ptr(), site.in_features, site.out_features)
        self._make_tables(slots=16)
        self.records = SlotRecords(self.a, self.b, slots=16)

    def adjust(self, slot: int, adjustment: Adjustment) -> None:
        """From now on the base's output is changed for this slot."""
        vectors = (adjustment.scale, adjustment.shift)
        moved = [None if vector is None else vector.to(self.a.device) for vector in vectors]
        self.adjustments[slot] = Adjustment(*moved)
        self.records.put_adjustment(slot, self.adjustments[slot])
        self._tables[-1][2][slot] = [0 if vector is None else vector.data_ptr() for vector in moved]

    def write(self, slot: int, rows: list[int], weights: LoraWeights) -> None:
        """Copy a pair into ``rows``, of which there is at least one."""
        assert len(rows) <= self.max_rank
        index = _as_rows(rows, self.a.device)
        self.a[index] = weights.a.to(self.a.device)
        self.b[index] = weights.b.to(self.b.device)
        self.rows[slot] = index
        addresses, ranks, _ = self._tables[-1]
        self._lists[slot] = np.array(rows, dtype=np.int32)
        addresses[slot] = self._lists[slot].ctypes.data
        ranks[slot] = len(rows)
        self.records.put_rows(slot, rows)

    def hold(self, slot: int) -> None:
        """Give ``slot`` a place in the kernels' tables: they look up every slot at every site."""
        self.records.hold(slot)
        while slot >= len(self._tables[-1][1]):
            self._make_tables(slots=2 * len(self._tables[-1][1]))

    def free(self, slot: int, rows: list[int]) -> None:
        self.rows.pop(slot, None)
        self.adjustments.pop(slot, None)
        self._tables[-1][1][slot] = 0
        self._tables[-1][2][slot] = 0
        self._lists.pop(slot, None)
        self.records.drop(slot)
        self.allocator.give(rows)

    def _make_tables(self, slots: int) -> None:
        """Larger tables; the old ones stay, since a kernel may be reading them right now."""
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


def _as_rows(rows: list[int], device: torch.device) -> Rows:
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
