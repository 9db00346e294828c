"""4-bit weights in the order that CPU kernels read: panels of 32 outputs (see ``nf4.h``).

bitsandbytes' usual order is rows of outputs, with two weights in a byte, the first one in the high half. In
a panel each pair of inputs has 32 bytes. Their low halves are outputs 0 to 15, both inputs of one output side
by side, and their high halves are outputs 16 to 31.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32
"""Outputs of one panel."""


def pack_panels(packed: Tensor) -> Tensor:
    """uint8 [outputs, inputs / 2] in the usual order -> [outputs / 32, inputs / 2, 32]."""
    outputs, pairs = packed.shape
    first, second = packed.view(outputs // PANEL, 2, PANEL // 2, pairs).unbind(1)
    bytes_of_pair = torch.stack([(second & 0xF0) | (first >> 4), (second << 4) | (first & 15)], dim=-1)
    return bytes_of_pair.transpose(1, 2).reshape(outputs // PANEL, pairs, PANEL)


def unpack_panels(panels: Tensor) -> Tensor:
    """uint8 [outputs / 32, inputs / 2, 32] -> [outputs, inputs / 2] in the usual order."""
    count, pairs, _ = panels.shape
    first, second = panels.view(count, pairs, PANEL // 2, 2).unbind(-1)
    low = (first << 4) | (second & 15)
    high = (first & 0xF0) | (second >> 4)
    return torch.cat([low, high], dim=-1).transpose(1, 2).reshape(count * PANEL, pairs)
