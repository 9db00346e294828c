"""A step between its launch and its landing: the device has it, and the host has not read what it drew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from server.engine.sampling.sampler import Draw, Drawn
from server.engine.sequence import Chunk, Sequence


@dataclass(frozen=True, slots=True)
class Flight:
    """One launched step.

    Attributes:
        chunks: all that it computes.
        void: sequences whose chunk was computed from a token that turned out another.
    """

    chunks: list[Chunk]
    _drawn: Drawn
    void: set[Sequence] = field(default_factory=set)

    @property
    def tokens(self) -> Tensor:
        """What it draws, on the device, for the next step to go on from."""
        return self._drawn.tokens

    def read(self) -> list[tuple[Chunk, Draw | None]]:
        """Each valid chunk with its draw, None if it does not sample. Waits until the device is so far."""
        return list(self._pairs(iter(self._drawn.read())))

    def withdraw(self, sequence: Sequence) -> Chunk | None:
        """Make its chunk void and return it; None if it has none here."""
        chunk = next((chunk for chunk in self.chunks if chunk.sequence is sequence), None)
        if chunk is not None:
            self.void.add(sequence)
        return chunk

    def _pairs(self, draws: Iterator[Draw]) -> Iterator[tuple[Chunk, Draw | None]]:
        for chunk in self.chunks:
            draw = next(draws) if chunk.samples else None
            if chunk.sequence not in self.void:
                yield chunk, draw
