"""The memory of all sites' A and B: those whose rows have one width lie in one tensor, a *shelf*.

So an adapter comes to a GPU by one copy and one scatter a width (three for Llama, wherever its rows are),
not by one or two a matrix: launching those 420 copies of an 8B Llama would take the loader's thread 3 ms and
more, in which it and the engine's thread hold each other up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.pool.packed import PackedWeights, Side, by_width
from adapters.sites import Site
from adapters.transfer import send_coalesced

_MULTIPLE = 8
"""A matrix begins at a multiple of so many rows, hence of 16 bytes."""

STAGING = 32 << 20
"""Bytes on a GPU through which adapters come, a part at a time."""


class RowStore:
    """Shelves [matrices * rows, width], not initialised.

    Args:
        num_rows: of each matrix.
    """

    def __init__(
        self, sites: Mapping[str, Site], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_rows, self._device = num_rows, device
        self._first: dict[Side, int] = {}  # row of its shelf where a matrix begins
        lengths: dict[int, int] = {}
        for name, site in sites.items():
            for side, width in enumerate((site.in_features, site.out_features)):
                self._first[name, side] = lengths.get(width, 0)
                lengths[width] = self._first[name, side] + -(-num_rows // _MULTIPLE) * _MULTIPLE
        self._shelves = {
            width: torch.empty(length, width, dtype=dtype, device=device) for width, length in lengths.items()
        }
        widest = max(lengths, default=0)
        size = max(STAGING // dtype.itemsize, widest) if device.type == "cuda" else 0
        self._staging = torch.empty(size, dtype=dtype, device=device)

    def pair(self, name: str, site: Site) -> tuple[Tensor, Tensor]:
        """A [num_rows, in_features] and B [num_rows, out_features] of a site."""
        a, b = (
            self._shelves[width][self._first[name, side] :][: self._num_rows]
            for side, width in enumerate((site.in_features, site.out_features))
        )
        return a, b

    def write(self, weights: PackedWeights, rows: Mapping[str, npt.NDArray[np.int32]]) -> None:
        """Copy pairs into their sites' ``rows``, on the current stream, which the caller waits for."""
        for width, sides in by_width(weights).items():
            arrays = [rows[name] for name, _ in sides]
            firsts = np.array([self._first[side] for side in sides], np.int64)
            places = np.concatenate(arrays) + np.repeat(firsts, [len(array) for array in arrays])
            self._scatter(self._shelves[width], torch.from_numpy(places), weights.rows[width])

    def _scatter(self, shelf: Tensor, places: Tensor, rows: Tensor) -> None:
        """``rows`` go to ``places`` of the shelf, through the staging memory where there is any."""
        (index,) = send_coalesced([places], self._device)
        step = len(self._staging) // shelf.shape[1] or len(rows)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            if len(self._staging):
                part = self._staging[: part.numel()].view(part.shape).copy_(part, non_blocking=True)
            shelf.index_copy_(0, index[start : start + step], part)
