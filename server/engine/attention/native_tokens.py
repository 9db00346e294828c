"""A step's tokens for the native kernels (``Tokens`` in native.h): plain integer arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.kernels.cpu.structs import Tokens
from server.engine.sequence import Chunk

TILE = 16
"""Tokens of a tile, see ``adapters/kernels/cpu/src/attention.h``."""

Ints = npt.NDArray[np.int64]


class NativeTokens:
    """The arrays of the current step; ``struct`` points at them."""

    def __init__(self, block_size: int) -> None:
        self._tiles_in_block = np.arange(block_size // TILE)
        self._kept: dict[str, Ints] = {}
        self.struct = Tokens()

    def begin(self, chunks: Sequence[Chunk]) -> None:
        per_chunk = [self._tiles(chunk) for chunk in chunks]
        starts = np.cumsum([0, *map(len, per_chunk[:-1])])
        lengths = [chunk.length for chunk in chunks]
        sequences = np.repeat(np.arange(len(chunks)), lengths)
        positions = np.concatenate([np.arange(c.start, c.start + c.length) for c in chunks])
        tiles = np.concatenate(per_chunk)
        kv_slots = tiles[starts[sequences] + positions // TILE] * TILE + positions % TILE
        self._point(
            kv_slots=kv_slots, positions=positions, sequences=sequences, tile_starts=starts, tiles=tiles
        )
        self.struct.count = len(positions)

    def _tiles(self, chunk: Chunk) -> Ints:
        """Tile ids of the sequence's blocks, in order."""
        assert chunk.sequence.table is not None
        blocks = np.array(chunk.sequence.table.blocks, np.int64)
        room = len(blocks) * len(self._tiles_in_block) * TILE
        if chunk.stop > room:
            raise ValueError(f"a sequence of {chunk.stop} tokens has KV blocks for {room}")
        tiles: Ints = (blocks[:, None] * len(self._tiles_in_block) + self._tiles_in_block).reshape(-1)
        return tiles

    def _point(self, **arrays: npt.NDArray[np.integer[Any]]) -> None:
        self._kept = {field: np.ascontiguousarray(values, np.int64) for field, values in arrays.items()}
        for field, values in self._kept.items():
            setattr(self.struct, field, values.ctypes.data)
