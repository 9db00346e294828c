"""Records by slot that tell GPU kernels where an adapter's data is at each site. They are stored on the GPU.

A kernel finds everything about a site from one address that never changes, its row of ``sites``. So tables
can grow and rows can move while a CUDA graph stays valid.

Records are written on another stream (``transfer.py``). A step in flight still never reads half a record:

* A step reads only slots that are pinned from before it starts until the device has finished it.
* One thread (the loader's) enqueues everything here on one stream, and waits for that stream before the slot
  can be pinned. So records and tables are written in order and are complete when they are read.
* Freeing a slot writes nothing, so it needs no order. Its next owner's record is written at all sites.
* A growing table is copied first and switched to afterwards, on the same stream. A step in flight may find
  the old or the new table. Both have the same records of its slots, and the old one is kept.
* The memory belongs to that stream in torch's allocator and is freed when no step reads it any more. It is
  only reused on the same stream, so ``record_stream`` on the steps' stream is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.transfer import host_memory

Record = tuple[int, int, int, int]
"""Address of the int32 rows, their number, and addresses of the float32 scale and shift (0 = none)."""

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
        """Set the addresses of a site's matrices, once. Returns its row of ``sites``."""
        self.sites[number, :2] = torch.tensor([a.data_ptr(), b.data_ptr()])
        return self.sites[number]

    def write(self, slot: int, records: Sequence[Record]) -> None:
        """Write the slot's records at all sites, on the current stream.

        The caller keeps the tensors that they point to.
        """
        while slot >= self._tables[-1].shape[1]:
            self._grow(2 * self._tables[-1].shape[1])
        host = host_memory(len(records) * FIELDS, torch.int64, self._device).view(-1, FIELDS)
        host.copy_(torch.tensor(records, dtype=torch.int64))
        self._tables[-1][:, slot] = host.to(self._device, non_blocking=True)

    def _grow(self, slots: int) -> None:
        """Make a larger table. Old tables are kept, because a kernel may be reading them."""
        count = len(self.sites)
        table = torch.zeros(count, slots, FIELDS, dtype=torch.int64, device=self._device)
        if self._tables:
            table[:, : self._tables[-1].shape[1]] = self._tables[-1]
        self._tables.append(table)
        offsets = torch.arange(count, device=self._device) * (slots * _BYTES)
        self.sites[:, 2] = offsets + table.data_ptr()
