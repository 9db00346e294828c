"""Copies tensors to a GPU so that only the copying thread waits. On a CPU these functions copy nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("manylora.adapters")

Copying = Callable[[], AbstractContextManager[object]]
"""A context whose work runs on a separate stream. The work is complete when the context ends."""

ALIGNMENT = 16
"""Alignment in bytes that GPU kernels assume for an adapter's vectors."""


def copying_for(device: torch.device) -> Copying:
    """The context for copies to ``device``."""
    return _CopyStream(device) if device.type == "cuda" else nullcontext


class _CopyStream:
    """A CUDA stream beside the steps' stream. Earlier work on the device is complete when it is created."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # blocking: this thread sleeps and leaves its core to the engine's thread
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            done.record(self._stream)
            done.synchronize()


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """``host`` in memory from which ``device`` copies asynchronously."""
    return host.pin_memory() if device.type == "cuda" else host


def send(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on the device. On CUDA the copy is queued like a kernel, and the caller does not wait."""
    return pinned(host, device).to(device, non_blocking=True)


def send_coalesced(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """1-D tensors of one type on ``device``. On a GPU they take one copy; the caller waits for its stream."""
    return list(tensors) if device.type == "cpu" or not tensors else joined(tensors, device)


def joined(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on ``device`` in one block of memory, each aligned to ``ALIGNMENT`` bytes."""
    unit = ALIGNMENT // tensors[0].element_size()
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += [tensor, tensor.new_zeros(-len(tensor) % unit)]
    sizes = [len(piece) for piece in pieces]
    host = host_memory(sum(sizes), tensors[0].dtype, device)
    torch.cat(pieces, out=host)
    return list(torch.split(host.to(device, non_blocking=True), sizes))[::2]


def host_memory(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] for copies to ``device``. It is pinned for a GPU, if the system allows it."""
    if device.type == "cuda":
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            warn_pageable(str(error).partition("\n")[0])
    return torch.empty(size, dtype=dtype)


@cache
def warn_pageable(reason: str) -> None:
    """Log each reason once."""
    log.warning("host memory cannot be pinned, so adapters are loaded more slowly: %s", reason)
