"""One block of pinned host memory, allocated in ranges.

Pinning is slow and may block a GPU's other streams, so it is done once, at the start.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from adapters.pool.free_runs import FreeRuns
from adapters.transfer import warn_pageable

_UNIT = 256
"""Alignment of ranges, in bytes."""

_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every device."""


class PinnedBuffer:
    """A first-fit allocator. Ranges have owners. Not thread-safe: the caller locks.

    Args:
        memory: uint8 [n].
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._runs = FreeRuns(len(memory) // _UNIT)
        self._taken: dict[str, tuple[int, int]] = {}  # in units

    def allocate(self, owner: str, nbytes: int) -> Tensor | None:
        """uint8 [nbytes] for a new ``owner``; None if no free range is that large."""
        units = -(-nbytes // _UNIT)
        start = self._runs.take_run(units) if units else 0
        if start is None:
            return None
        self._taken[owner] = start, start + units
        return self._memory[start * _UNIT :][:nbytes]

    def free(self, owner: str) -> None:
        """Free the range of ``owner``, if it has one."""
        self._runs.free(*self._taken.pop(owner, (0, 0)))

    def check_integrity(self) -> None:
        """Assert that every byte is either free or in one range (for tests)."""
        self._runs.check_integrity(self._taken.values())


def pinned_buffer(nbytes: int, device: torch.device) -> PinnedBuffer | None:
    """A buffer for copies to ``device``. None if that is not a GPU, ``nbytes`` is too small or pinning fails.

    Normal memory is registered as pinned, because torch rounds pinned allocations up to a power of two.
    """
    if device.type != "cuda" or nbytes < _UNIT:
        return None
    try:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        _check(_cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE))
    except RuntimeError as error:
        warn_pageable(str(error).partition("\n")[0])
        return None
    buffer = PinnedBuffer(memory)
    weakref.finalize(buffer, _unpin, memory).atexit = False
    return buffer


def _unpin(memory: Tensor) -> None:
    _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"CUDA error {int(status)} of cudaHostRegister")
