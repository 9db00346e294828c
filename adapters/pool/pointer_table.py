"""Addresses by slot, where native kernels look them up."""

from __future__ import annotations

from ctypes import addressof, c_void_p

import numpy as np
from torch import Tensor


class PointerTable:
    """One tensor a slot, or none.

    Attributes:
        cell: address of the address of the table, which moves when it grows.
    """

    def __init__(self, slots: int = 16) -> None:
        self._cell = c_void_p()
        self._tensors: dict[int, Tensor] = {}
        self._tables: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._append(slots)

    @property
    def cell(self) -> int:
        return addressof(self._cell)

    def hold(self, slot: int) -> None:
        """Give ``slot`` a place."""
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
        """Those with a tensor."""
        return set(self._tensors)

    def _append(self, slots: int) -> None:
        """A larger table; the old ones stay, since a kernel may be reading them right now."""
        table = np.zeros(slots, np.int64)
        if self._tables:
            table[: len(self._tables[-1])] = self._tables[-1]
        self._tables.append(table)
        self._cell.value = table.ctypes.data
