"""Which rows of the step under way are whose. One object, shared by all wrapped modules of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adapters.kernels import Segment
from adapters.pool.extras_pool import ExtrasPool, ResidentExtras


class Own(NamedTuple):
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
        own: those of them whose adapter has extras.
        own_heads: the same of the rows that the output head gets.
    """

    def __init__(self, extras: ExtrasPool) -> None:
        self.tokens = 0
        self.segments: list[Segment] = []
        self.own: list[Own] = []
        self.own_heads: list[Own] = []
        self._extras = extras

    def begin(self, tokens: int, segments: list[Segment], heads: Tensor) -> None:
        """``heads``: int64 [n], which tokens' rows the head gets, in order."""
        self.tokens = tokens
        self.segments = segments
        self.own = [
            Own(*segment, extras)
            for segment in segments
            if (extras := self._extras.get(segment.slot)) is not None
        ]
        self.own_heads = _of_rows(self.own, heads.tolist()) if self.own else []


def _of_rows(own: list[Own], tokens: list[int]) -> list[Own]:
    """``own`` by place in ``tokens``."""
    found: list[Own] = []
    for row, token in enumerate(tokens):
        part = next((part for part in own if part.start <= token < part.stop), None)
        if part is None:
            continue
        if found and (found[-1].slot, found[-1].stop) == (part.slot, row):
            found[-1] = found[-1]._replace(stop=row + 1)
        else:
            found.append(part._replace(start=row, stop=row + 1))
    return found
