"""A step that the device has been given, and whose sampled tokens the host has not read yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from server.engine.sampling.sampler import PendingSamples, Sample
from server.engine.sequence import Chunk, Sequence


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """One launched step.

    Attributes:
        chunks: everything that the step computes.
        discarded: sequences whose chunk here is ignored: it was computed from a provisional token that was
            then revised.
    """

    chunks: list[Chunk]
    _samples: PendingSamples
    discarded: set[Sequence] = field(default_factory=set)

    @property
    def tokens(self) -> Tensor:
        """int64 [chunks that sample], the sampled tokens, on the device: the next step's ``prev_tokens``."""
        return self._samples.tokens

    def read(self) -> list[tuple[Chunk, Sample | None]]:
        """Each chunk that is not discarded, with its sample (None if it does not sample).

        Waits until the device has computed the step.
        """
        return list(self._pairs(iter(self._samples.read())))

    def discard(self, sequence: Sequence) -> Chunk | None:
        """Ignore the sequence's chunk from now on, and return it; None if the step has none of it."""
        chunk = next((chunk for chunk in self.chunks if chunk.sequence is sequence), None)
        if chunk is not None:
            self.discarded.add(sequence)
        return chunk

    def _pairs(self, samples: Iterator[Sample]) -> Iterator[tuple[Chunk, Sample | None]]:
        for chunk in self.chunks:
            sample = next(samples) if chunk.samples else None
            if chunk.sequence not in self.discarded:
                yield chunk, sample
