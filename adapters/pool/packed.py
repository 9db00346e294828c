"""An adapter's pairs in one buffer. Rows that go to the same tensor of ``row_store.py`` are adjacent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapters.artifact import Adapter, LoraWeights

Side = tuple[str, int]
"""A matrix: its site, and 0 for A or 1 for B."""


class PackedWeights(Mapping[str, LoraWeights]):
    """Pairs by site, as views of one buffer.

    Attributes:
        rows: for each width, [n, width]: the rows of all matrices of that width, in the order of
            ``by_width``.
    """

    def __init__(self, weights: Mapping[str, LoraWeights], memory: Tensor | None = None) -> None:
        """Copies ``weights`` into ``memory``, uint8 [nbytes_of(weights)], or into new memory."""
        if memory is None:
            memory = torch.empty(nbytes_of(weights), dtype=torch.uint8)
        self.rows: dict[int, Tensor] = {}
        placed: dict[Side, Tensor] = {}
        start = 0
        for width, sides in by_width(weights).items():
            matrices = [matrix_of(weights, side) for side in sides]
            shape, dtype = (sum(map(len, matrices)), width), matrices[0].dtype
            stop = start + shape[0] * width * dtype.itemsize
            block = memory[start:stop].view(dtype).view(shape)
            torch.cat(matrices, out=block)
            self.rows[width] = block
            placed |= zip(sides, torch.split(block, [len(matrix) for matrix in matrices]), strict=True)
            start = stop
        self._pairs = {name: LoraWeights(placed[name, 0], placed[name, 1]) for name in weights}

    def __getitem__(self, name: str) -> LoraWeights:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def by_width(weights: Mapping[str, LoraWeights]) -> dict[int, list[Side]]:
    """The matrices by the width of their rows, in the order of ``weights``."""
    sides: dict[int, list[Side]] = {}
    for name in weights:
        for side in ((name, 0), (name, 1)):
            sides.setdefault(matrix_of(weights, side).shape[1], []).append(side)
    return sides


def matrix_of(weights: Mapping[str, LoraWeights], side: Side) -> Tensor:
    pair = weights[side[0]]
    return (pair.a, pair.b)[side[1]]


def nbytes_of(weights: Mapping[str, LoraWeights]) -> int:
    return sum(pair.a.nbytes + pair.b.nbytes for pair in weights.values())


def packed(adapter: Adapter, memory: Tensor | None = None) -> Adapter:
    """The same adapter with packed pairs."""
    return replace(adapter, weights=PackedWeights(adapter.weights, memory))
