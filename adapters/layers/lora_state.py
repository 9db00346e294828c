"""The adapter of each row of the current step. All wrapped modules of a model share one object."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adapters.kernels import Segment
from adapters.pool.extras_pool import ExtrasPool, ResidentExtras


class ExtrasSegment(NamedTuple):
    """Rows [start, stop) belong to the adapter in ``slot``, which has ``extras``."""

    slot: int
    start: int
    stop: int
    extras: ResidentExtras


class LoraState:
    """Set by ``begin`` for every step.

    Attributes:
        tokens: how many tokens the step has.
        segments: runs of tokens that use the same adapter, in order, without base tokens.
        extras_segments: the segments whose adapter has extras.
        extras_head_rows: the same segments in terms of the rows that the output head gets.
    """

    def __init__(self, extras: ExtrasPool) -> None:
        self.tokens = 0
        self.segments: list[Segment] = []
        self.extras_segments: list[ExtrasSegment] = []
        self.extras_head_rows: list[ExtrasSegment] = []
        self._extras = extras

    def begin(self, tokens: int, segments: list[Segment], heads: Tensor) -> None:
        """``heads``: int64 [n], the tokens whose rows the head gets, in order."""
        self.tokens = tokens
        self.segments = segments
        self.extras_segments = [
            ExtrasSegment(*segment, extras)
            for segment in segments
            if (extras := self._extras.get(segment.slot)) is not None
        ]
        self.extras_head_rows = _of_rows(self.extras_segments, heads.tolist()) if self.extras_segments else []


def _of_rows(segments: list[ExtrasSegment], tokens: list[int]) -> list[ExtrasSegment]:
    """``segments`` in terms of positions in ``tokens``."""
    found: list[ExtrasSegment] = []
    for row, token in enumerate(tokens):
        part = next((part for part in segments if part.start <= token < part.stop), None)
        if part is None:
            continue
        if found and (found[-1].slot, found[-1].stop) == (part.slot, row):
            found[-1] = found[-1]._replace(stop=row + 1)
        else:
            found.append(part._replace(start=row, stop=row + 1))
    return found
