"""A step that is being built: the chunks so far and the token budget that is left."""

from __future__ import annotations

import math
from collections import defaultdict

from server.engine.lanes import Lane
from server.engine.sequence import Chunk, Sequence


class Step:
    """Chunks under a token budget.

    Attributes:
        budget: tokens that are left.
        chunks: by sequence key.
        prompts: sequences with prompt tokens to compute, by lane, oldest first.
        refused: lanes whose head was refused a running slot, because it is kept for another lane.
        not_ready: lanes whose head's adapter is not loaded.
        blocked_from: no sequence starts in a lane with at least this many running sequences.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[tuple[str, int], Chunk] = {}
        self.prompts: defaultdict[Lane, list[Sequence]] = defaultdict(list)
        self.refused: list[Lane] = []
        self.not_ready: set[Lane] = set()
        self.blocked_from: float = math.inf

    def given(self, sequence: Sequence) -> int:
        chunk = self.chunks.get(sequence.key)
        return chunk.length if chunk else 0

    def give(self, chunk: Chunk, more: int) -> None:
        """Set a sequence's chunk, which adds ``more`` tokens to the step."""
        self.budget -= more
        self.chunks[chunk.sequence.key] = chunk

    def cancel(self, sequence: Sequence) -> None:
        """Drop a preempted sequence. Its blocks go to running ones, so none starts in this step."""
        chunk = self.chunks.pop(sequence.key, None)
        if chunk is not None:
            self.budget += chunk.length
        self.blocked_from = 0

    def give_up(self) -> None:
        """Drop all chunks and the rest of the budget."""
        self.chunks.clear()
        self.budget = 0
