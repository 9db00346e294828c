"""A table of addresses by slot, which native kernels read."""

from __future__ import annotations

from ctypes import addressof, c_void_p

import numpy as np
from torch import Tensor


class PointerTable:
    """At most one tensor for each slot.

    Attributes:
        cell: address of a cell that holds the table's address. The table moves when it grows; the cell does
            not.
    """

    def __init__(self, slots: int = 16) -> None:
        self._cell = c_void_p()
        self._tensors: dict[int, Tensor] = {}
        self._tables: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._append(slots)

    @property
    def cell(self) -> int:
        return addressof(self._cell)

    def ensure_slot(self, slot: int) -> None:
        """Make room for ``slot``."""
        while slot >= len(self._tables[-1]):
            self._append(2 * len(self._tables[-1]))

    def put(self, slot: int, tensor: Tensor) -> None:
        self._tensors[slot] = tensor
        self._tables[-1][slot] = tensor.data_ptr()

    def drop(self, slot: int) -> None:
        self._tensors.pop(slot, None)
        self._tables[-1][slot] = 0

    @property
    def slots(self) -> set[int]:
        """The slots that have a tensor."""
        return set(self._tensors)

    def _append(self, slots: int) -> None:
        """Append a larger table. Old tables are kept, because a kernel may be reading them."""
        table = np.zeros(slots, np.int64)
        if self._tables:
            table[: len(self._tables[-1])] = self._tables[-1]
        self._tables.append(table)
        self._cell.value = table.ctypes.data
