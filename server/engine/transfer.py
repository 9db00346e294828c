"""Copies between host and device in which neither side waits for the other. On a CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def resolve(tokens: Tensor, prev_tokens: Tensor | None) -> Tensor:
    """``tokens`` with every negative id -1-i replaced by ``prev_tokens[i]``; both int64, on one device.

    A negative id stands for a token that the previous step samples and that the host has not read yet.
    """
    if prev_tokens is None or len(prev_tokens) == 0:
        return tokens
    return torch.where(tokens < 0, prev_tokens[(-1 - tokens).clamp_(min=0)], tokens)


class Download:
    """Tensors being copied to the host, in one copy queued behind the kernels that compute them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None
        if tensors[0].is_cuda:
            packed = pack(tensors)
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied = host, event

    def wait(self) -> Sequence[Tensor]:
        """The same tensors on the host. Waits until the copy has finished."""
        if self._copied is None:
            return self._tensors
        host, event = self._copied
        event.synchronize()
        return unpack(host, self._tensors)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors in one row of float64, which represents float32, flags and token ids exactly."""
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that ``pack`` was given, with the shapes and dtypes of ``like``."""
    parts: tuple[Tensor, ...] = packed.split([tensor.numel() for tensor in like])  # type: ignore[no-untyped-call]
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
