"""By slot, what a kernel on a GPU must know of an adapter at each site; kept on that device.

A kernel finds everything of a site from one address that never changes, its row of ``sites``: tables grow and
rows move under a CUDA graph, which stays valid.

Why a step in flight never reads half a record, though they are written on another stream (``transfer.py``):

* A step reads only slots that are pinned from before it starts until the device is done with it.
* Everything here is enqueued by one thread (the loader's) on one stream, and that thread waits for the stream
  before the slot can be pinned. So records and tables are written in order, and are whole when they are read.
* Giving up a slot writes nothing, so it needs no order: its next owner's record is written at all sites.
* A table that grows is copied first and then switched to, on the same stream. A step in flight may find the
  old one or the new one: both hold its slots alike, and the old one is kept.
* Memory comes from the allocator's share of that stream and is given back when no step reads it any more; it
  can only be handed out again for that same stream. So it need not be recorded on the steps' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.transfer import host_memory

Record = tuple[int, int, int, int]
"""Address of the int32 rows, their number, addresses of the float32 scale and shift (0 = none)."""

FIELDS = 4
_BYTES = FIELDS * torch.int64.itemsize


class SlotRecords:
    """The records of ``count`` sites.

    Attributes:
        sites: int64 [count, 4] on the device: addresses of A, of B and of the site's records [slots, 4]. The
            last column only makes each row begin at a multiple of 16 bytes.
    """

    def __init__(self, count: int, device: torch.device, slots: int = 16) -> None:
        self._device = device
        self.sites = torch.zeros(count, 4, dtype=torch.int64, device=device)
        self._tables: list[Tensor] = []
        self._grow(slots)

    def place(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        """Say where a site's matrices are, once; its row of ``sites``."""
        self.sites[number, :2] = torch.tensor([a.data_ptr(), b.data_ptr()])
        return self.sites[number]

    def write(self, slot: int, records: Sequence[Record]) -> None:
        """The slot's records at all sites, on the current stream. Its owner keeps what they point at."""
        while slot >= self._tables[-1].shape[1]:
            self._grow(2 * self._tables[-1].shape[1])
        host = host_memory(len(records) * FIELDS, torch.int64, self._device).view(-1, FIELDS)
        host.copy_(torch.tensor(records, dtype=torch.int64))
        self._tables[-1][:, slot] = host.to(self._device, non_blocking=True)

    def _grow(self, slots: int) -> None:
        """A larger table; the old ones stay, since a kernel may be reading them right now."""
        count = len(self.sites)
        table = torch.zeros(count, slots, FIELDS, dtype=torch.int64, device=self._device)
        if self._tables:
            table[:, : self._tables[-1].shape[1]] = self._tables[-1]
        self._tables.append(table)
        offsets = torch.arange(count, device=self._device) * (slots * _BYTES)
        self.sites[:, 2] = offsets + table.data_ptr()
