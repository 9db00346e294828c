"""How tensors get to a GPU while only their own thread waits for them. On a CPU all of this is nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("manylora.adapters")

Copying = Callable[[], AbstractContextManager[object]]
"""Within it, work goes to a stream of its own; at its end that work is done."""

ALIGNMENT = 16
"""Bytes: where GPU kernels take an adapter's vectors to begin."""


def copying_for(device: torch.device) -> Copying:
    """Where copies to ``device`` are to be made."""
    return _CopyStream(device) if device.type == "cuda" else nullcontext


class _CopyStream:
    """A CUDA stream beside the one that steps run on; what was made for the device before is complete."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # blocking: this thread sleeps until then, and leaves its core to the engine's
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            done.record(self._stream)
            done.synchronize()


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """``host`` where ``device`` copies from without anybody waiting for it."""
    return host.pin_memory() if device.type == "cuda" else host


def send(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on the device; on CUDA the copy is queued like a kernel and the caller goes on."""
    return pinned(host, device).to(device, non_blocking=True)


def send_coalesced(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """1-D tensors of one type, on ``device``; on a GPU by one copy, which is waited for with its stream."""
    return list(tensors) if device.type == "cpu" or not tensors else joined(tensors, device)


def joined(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on ``device`` in one piece of memory, each at a multiple of ``ALIGNMENT``."""
    unit = ALIGNMENT // tensors[0].element_size()
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += [tensor, tensor.new_zeros(-len(tensor) % unit)]
    sizes = [len(piece) for piece in pieces]
    host = host_memory(sum(sizes), tensors[0].dtype, device)
    torch.cat(pieces, out=host)
    return list(torch.split(host.to(device, non_blocking=True), sizes))[::2]


def host_memory(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] for copies to ``device``: pinned where it is a GPU, if the system lets us."""
    if device.type == "cuda":
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            say_pageable(str(error).partition("\n")[0])
    return torch.empty(size, dtype=dtype)


@cache
def say_pageable(reason: str) -> None:
    """Once a reason."""
    log.warning("host memory cannot be pinned, so that adapters come to the device more slowly: %s", reason)
