"""Which attention backend serves a model on this machine; heavy ones are imported only when chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from server.engine.attention import AttentionBackend, KvShape
from server.engine.attention.torch_paged import TorchPaged


def choose(
    shapes: Mapping[int, KvShape], block_size: int, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend for this model on this machine, chosen once when the model is built."""
    from adapters.native import library

    native = library() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if native is not None:
        from server.engine.attention.native_paged import NativePaged

        if NativePaged.fits(shapes, block_size):
            return NativePaged(native, block_size)
    return TorchPaged(block_size, device, dtype)
