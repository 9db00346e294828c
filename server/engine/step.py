"""A step while it is put together: what it computes so far, and what it has left to give."""

from __future__ import annotations

import math
from collections import defaultdict

from server.engine.lanes import Lane
from server.engine.sequence import Chunk, Sequence


class Step:
    """Chunks under a budget of tokens.

    Attributes:
        budget: tokens that are left.
        chunks: by sequence.
        prompts: those under way, by lane, oldest first.
        refused: lanes that left a place to others.
        not_ready: lanes whose head's adapter is not there.
        blocked_from: nobody starts in a lane that holds so many places or more.
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
        """``more`` tokens than its sequence had."""
        self.budget -= more
        self.chunks[chunk.sequence.key] = chunk

    def cancel(self, sequence: Sequence) -> None:
        """It is preempted; its blocks are for those that run, so nobody starts in this step."""
        chunk = self.chunks.pop(sequence.key, None)
        if chunk is not None:
            self.budget += chunk.length
        self.blocked_from = 0

    def give_up(self) -> None:
        """End with nothing."""
        self.chunks.clear()
        self.budget = 0
