"""One piece of pinned host memory, given out in ranges.

Pinning is slow and may make a GPU's other streams wait, so all of it is done once, at the start.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from adapters.transfer import say_pageable

_UNIT = 256
"""Ranges begin and end at multiples of so many bytes."""

_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every device."""


class Slab:
    """First fit, by owner. Not thread-safe: its owner locks.

    Args:
        memory: uint8 [n].
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._holes = [(0, len(memory) // _UNIT * _UNIT)]  # [start, stop), ascending, never adjacent
        self._taken: dict[str, tuple[int, int]] = {}

    def take(self, owner: str, nbytes: int) -> Tensor | None:
        """uint8 [nbytes] for a new ``owner``; None if no hole is that large."""
        size = -(-nbytes // _UNIT) * _UNIT
        for i, (start, stop) in enumerate(self._holes):
            if stop - start >= size:
                self._holes[i : i + 1] = [(start + size, stop)] if stop - start > size else []
                self._taken[owner] = (start, start + size)
                return self._memory[start : start + nbytes]
        return None

    def give(self, owner: str) -> None:
        """Take back what ``owner`` has, if anything."""
        if owner not in self._taken:
            return
        holes: list[tuple[int, int]] = []
        for start, stop in sorted([*self._holes, self._taken.pop(owner)]):
            if holes and holes[-1][1] == start:
                holes[-1] = (holes[-1][0], stop)
            elif start < stop:
                holes.append((start, stop))
        self._holes = holes

    def check_integrity(self) -> None:
        """Assert that every byte is taken once or free once (for tests)."""
        everything = sorted([*self._holes, *(taken for taken in self._taken.values() if taken[0] < taken[1])])
        bounds = [0, *(stop for _, stop in everything)]
        assert [start for start, _ in everything] == bounds[:-1], "bytes leaked or were given twice"
        assert bounds[-1] == len(self._memory) // _UNIT * _UNIT, "bytes leaked at the end"


def pinned_slab(nbytes: int, device: torch.device) -> Slab | None:
    """For copies to ``device``; None where it is no GPU, nothing is asked for or the system refuses.

    Pinned where it lies: what torch allocates pinned is rounded up to a power of two.
    """
    if device.type != "cuda" or nbytes < _UNIT:
        return None
    try:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        _check(_cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE))
    except RuntimeError as error:
        say_pageable(str(error).partition("\n")[0])
        return None
    slab = Slab(memory)
    weakref.finalize(slab, _unpin, memory).atexit = False
    return slab


def _unpin(memory: Tensor) -> None:
    _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"CUDA error {int(status)} of cudaHostRegister")
