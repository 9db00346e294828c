"""A step's metadata for kernels that read pages in place: integers, made with numpy, sent in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.sequence import Chunk

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class FlashMetadata:
    """The metadata of a step of n sequences.

    Attributes:
        new_slots: int64 [tokens], block * block_size + offset of each token of the step.
        query_starts: int32 [n + 1], the start of each sequence's tokens in the step, and the end.
        kv_starts: int32 [n + 1], the cumulative sum of ``lengths``.
        lengths: int32 [n], the tokens of each sequence, with those of this step.
        tables: int32 [n, width], the blocks of each sequence in order; arbitrary beyond its length.
        max_query: an upper bound of a sequence's tokens in the step.
        max_length: an upper bound of ``lengths``.
    """

    new_slots: Tensor
    query_starts: Tensor
    kv_starts: Tensor
    lengths: Tensor
    tables: Tensor
    max_query: int
    max_length: int


class FlashMetadataBuilder:
    """Builds the metadata of steps.

    Args:
        spare: the block that no sequence owns.
        width: blocks of the longest possible sequence.
    """

    def __init__(self, block_size: int, spare: int, width: int, device: torch.device) -> None:
        self._block_size = block_size
        self._spare = spare
        self._width = width
        self._device = device
        self._rows = _Rows()
        self._by_graph_batch_size: dict[int, tuple[Tensor, FlashMetadata]] = {}

    def build(self, chunks: Sequence[Chunk], graph_batch_size: int | None = None) -> FlashMetadata:
        """See ``AttentionBackend.begin``."""
        if graph_batch_size is not None:
            return self._graph_batch(chunks, graph_batch_size)
        starts, counts = _spans(chunks)
        longest = int((starts + counts).max())
        layout = _Layout(int(counts.sum()), len(chunks), -(-longest // self._block_size))
        device = self._filled(layout, chunks, starts, counts).to(self._device, non_blocking=True)
        return FlashMetadata(*layout.views(device), int(counts.max()), longest)

    def _graph_batch(self, chunks: Sequence[Chunk], graph_batch_size: int) -> FlashMetadata:
        """Metadata of ``graph_batch_size`` sequences, always in the same memory."""
        layout = _Layout(graph_batch_size, graph_batch_size, self._width)
        if graph_batch_size not in self._by_graph_batch_size:
            buffer = torch.empty(layout.size, dtype=torch.int32, device=self._device)
            metadata = FlashMetadata(*layout.views(buffer), 1, self._width * self._block_size)
            self._by_graph_batch_size[graph_batch_size] = buffer, metadata
        starts, counts = np.zeros(graph_batch_size, np.int32), np.ones(graph_batch_size, np.int32)
        starts[: len(chunks)], counts[: len(chunks)] = _spans(chunks)
        assert counts.max() == 1, "a step in a graph batch has one token a sequence"
        buffer, metadata = self._by_graph_batch_size[graph_batch_size]
        buffer.copy_(self._filled(layout, chunks, starts, counts), non_blocking=True)
        return metadata

    def _filled(self, layout: _Layout, chunks: Sequence[Chunk], starts: Ints, counts: Ints) -> Tensor:
        """The integers on the host. Sequences beyond the chunks use the spare block."""
        # A new tensor every time: torch reuses pinned memory only after the queued copy has finished.
        host = torch.empty(layout.size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        new_slots, query_starts, kv_starts, lengths, tables = (x.numpy() for x in layout.views(host))
        lengths[:] = starts + counts
        query_starts[0] = kv_starts[0] = 0
        np.cumsum(counts, out=query_starts[1:])
        np.cumsum(lengths, out=kv_starts[1:])
        tables[len(chunks) :, 0] = self._spare
        for row, blocks in zip(tables, self._rows.of(chunks), strict=False):
            used = min(len(blocks), len(row))  # a sequence may have blocks for later tokens
            row[:used] = blocks[:used]
        sequences = np.repeat(np.arange(layout.sequences), counts)
        positions = np.arange(layout.tokens) + (starts - query_starts[:-1])[sequences]
        block = tables[sequences, positions // self._block_size].astype(np.int64)
        new_slots[:] = block * self._block_size + positions % self._block_size
        return host


class _Layout(NamedTuple):
    """The layout of the metadata's tensors in one int32 buffer, each aligned to 16 bytes."""

    tokens: int
    sequences: int
    width: int

    @property
    def size(self) -> int:
        return sum(map(_padded, self._lengths))

    @property
    def _lengths(self) -> tuple[int, ...]:
        n = self.sequences
        return 2 * self.tokens, n + 1, n + 1, n, n * self.width

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of ``FlashMetadata``."""
        parts: list[Tensor] = []
        start = 0
        for length in self._lengths:
            parts.append(buffer[start : start + length])
            start += _padded(length)
        slots, query_starts, kv_starts, lengths, tables = parts
        return slots.view(torch.int64), query_starts, kv_starts, lengths, tables.view(-1, self.width)


class _Rows:
    """Block tables as arrays, cached from step to step while they do not change."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[int], Ints]] = {}

    def of(self, chunks: Sequence[Chunk]) -> list[Ints]:
        fresh: dict[int, tuple[list[int], Ints]] = {}
        rows: list[Ints] = []
        for chunk in chunks:
            assert chunk.sequence.table is not None
            blocks = chunk.sequence.table.blocks
            entry = self._kept.get(id(blocks))
            if entry is None or entry[0] != blocks:  # quick: both lists hold the same objects
                entry = blocks.copy(), np.array(blocks, np.int32)
            fresh[id(blocks)] = entry
            rows.append(entry[1])
        self._kept = fresh
        return rows


def _spans(chunks: Sequence[Chunk]) -> tuple[Ints, Ints]:
    """The start and the length of each chunk."""
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    return starts, np.array([chunk.length for chunk in chunks], np.int32)


def _padded(length: int) -> int:
    return -(-length // 4) * 4
