"""Cuts a step's segments into tiles, the units of work of a kernel's programs. No Triton."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters.kernels import Segment

_FEW = 4
"""Average tokens of a tile up to which single tokens are faster than tiles on tensor cores."""


class Tiles(NamedTuple):
    """``of``: int32 [n, 3], (slot, start, stop), of at most ``size`` tokens each."""

    of: Tensor
    size: int


def fitting(segments: list[Segment], size: int) -> Tiles:
    """Tiles of up to ``size`` tokens, or of one token if the segments are short."""
    tokens = sum(stop - start for _, start, stop in segments)
    tiles = cut(segments, size)
    return Tiles(tiles, size) if tokens > _FEW * len(tiles) else Tiles(cut(segments, 1), 1)


def cut(segments: list[Segment], size: int, count: int | None = None) -> Tensor:
    """int32 [n, 3], padded to ``count`` with empty tiles (slot -1)."""
    slots, starts, stops = np.array(segments, np.int32).reshape(-1, 3).T
    pieces = -(-(stops - starts) // size)
    ends = np.cumsum(pieces)
    filled = ends[-1] if len(ends) else 0
    place = np.arange(filled) - np.repeat(ends - pieces, pieces)  # of a tile within its segment
    tiles = np.full((filled if count is None else count, 3), -1, np.int32)
    tiles[:filled, 0] = np.repeat(slots, pieces)
    tiles[:filled, 1] = np.repeat(starts, pieces) + place * size
    tiles[:filled, 2] = np.minimum(tiles[:filled, 1] + size, np.repeat(stops, pieces))
    return torch.from_numpy(tiles)
