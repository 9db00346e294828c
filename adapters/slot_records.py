"""By slot, what a kernel on a GPU must know of an adapter at one site; kept on that device.

A kernel finds everything from one address that never changes, ``site``: tables grow and rows move under a
CUDA graph, which stays valid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adapters.artifact import Adjustment

FIELDS = 4
"""A record: address of the int32 rows, their number, addresses of the float32 scale and shift (0 = none)."""


class SlotRecords:
    """One site's records. What is written goes to the device in the order of the writer's current stream.

    Attributes:
        site: int64 [3] on the device: addresses of A, of B and of the records [slots, 4].
    """

    def __init__(self, a: Tensor, b: Tensor, slots: int) -> None:
        self._device = a.device
        self._rows: dict[int, Tensor] = {}
        self.site = torch.tensor([a.data_ptr(), b.data_ptr(), 0], device=a.device)
        self._host = np.zeros((0, FIELDS), np.int64)
        self._tables: list[Tensor] = []
        self._grow(slots)

    def hold(self, slot: int) -> None:
        """Give ``slot`` a place; it has nothing there yet."""
        while slot >= len(self._host):
            self._grow(2 * len(self._host))

    def put_rows(self, slot: int, rows: list[int]) -> None:
        self._rows[slot] = self._moved(torch.tensor(rows, dtype=torch.int32))
        self._set(slot, 0, self._rows[slot].data_ptr(), len(rows))

    def put_adjustment(self, slot: int, adjustment: Adjustment) -> None:
        """Its vectors are on the device already, and stay there until ``drop``."""
        vectors = (adjustment.scale, adjustment.shift)
        self._set(slot, 2, *(0 if vector is None else vector.data_ptr() for vector in vectors))

    def drop(self, slot: int) -> None:
        self._set(slot, 0, 0, 0, 0, 0)
        self._rows.pop(slot, None)

    def _set(self, slot: int, field: int, *values: int) -> None:
        self._host[slot, field : field + len(values)] = values
        if self._device.type == "cuda":  # else the table is this very memory
            self._tables[-1][slot].copy_(self._moved(torch.from_numpy(self._host[slot])))

    def _grow(self, slots: int) -> None:
        """A larger table; the old ones stay, since a kernel may be reading them right now."""
        host = np.zeros((slots, FIELDS), np.int64)
        host[: len(self._host)] = self._host
        self._host = host
        self._tables.append(self._moved(torch.from_numpy(host)))
        self.site[2] = self._tables[-1].data_ptr()

    def _moved(self, host: Tensor) -> Tensor:
        """On the device; without waiting for it, as memory that is not pinned would."""
        if self._device.type != "cuda":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)
