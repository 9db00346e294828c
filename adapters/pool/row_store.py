"""The memory of all sites' A and B. Matrices with the same row width share one tensor.

An adapter is copied to a GPU with one copy and one scatter for each width (three for Llama), not with one or
two copies for each matrix. An 8B Llama would need 420 copies. Launching those takes the loader's thread over
3 ms, in which it and the engine's thread block each other.
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
"""Rows to which a matrix's begin is aligned. So its address is a multiple of 16 bytes."""

STAGING = 32 << 20
"""Bytes of the staging buffer on a GPU. Adapters are copied through it in parts."""


class RowStore:
    """The tensors [matrices * rows, width], not initialised.

    Args:
        num_rows: rows of each matrix.
    """

    def __init__(
        self, sites: Mapping[str, Site], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_rows, self._device = num_rows, device
        self._first: dict[Side, int] = {}  # the first row of each matrix in its tensor
        lengths: dict[int, int] = {}
        for name, site in sites.items():
            for side, width in enumerate((site.in_features, site.out_features)):
                self._first[name, side] = lengths.get(width, 0)
                lengths[width] = self._first[name, side] + -(-num_rows // _MULTIPLE) * _MULTIPLE
        self._stacked = {
            width: torch.empty(length, width, dtype=dtype, device=device) for width, length in lengths.items()
        }
        widest = max(lengths, default=0)
        size = max(STAGING // dtype.itemsize, widest) if device.type == "cuda" else 0
        self._staging = torch.empty(size, dtype=dtype, device=device)

    def pair(self, name: str, site: Site) -> tuple[Tensor, Tensor]:
        """A [num_rows, in_features] and B [num_rows, out_features] of a site."""
        a, b = (
            self._stacked[width][self._first[name, side] :][: self._num_rows]
            for side, width in enumerate((site.in_features, site.out_features))
        )
        return a, b

    def write(self, weights: PackedWeights, rows: Mapping[str, npt.NDArray[np.int32]]) -> None:
        """Copy pairs into their sites' ``rows``, on the current stream. The caller waits for it."""
        for width, sides in by_width(weights).items():
            arrays = [rows[name] for name, _ in sides]
            firsts = np.array([self._first[side] for side in sides], np.int64)
            places = np.concatenate(arrays) + np.repeat(firsts, [len(array) for array in arrays])
            self._scatter(self._stacked[width], torch.from_numpy(places), weights.rows[width])

    def _scatter(self, stacked: Tensor, places: Tensor, rows: Tensor) -> None:
        """Copy ``rows`` to ``places`` of ``stacked``, through the staging buffer if there is one."""
        (index,) = send_coalesced([places], self._device)
        step = len(self._staging) // stacked.shape[1] or len(rows)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            if len(self._staging):
                part = self._staging[: part.numel()].view(part.shape).copy_(part, non_blocking=True)
            stacked.index_copy_(0, index[start : start + step], part)
