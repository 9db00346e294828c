"""For penalties: the distinct tokens of a sequence, and how often its answer has each. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float32]


class TokenCounts:
    """The counts of one sequence, updated by one token a step.

    Args:
        prompt: token ids that the sequence contains, with a count of 0.
        start: the number of tokens before the answer.
    """

    def __init__(self, prompt: Sequence[int], start: int) -> None:
        self._prompt: Ids = np.unique(np.array(prompt, np.int64))
        self._size = len(self._prompt)
        self._ids: Ids = np.concatenate([self._prompt, np.zeros(64, np.int64)])
        self._said: Counts = np.zeros(len(self._ids), np.float32)
        self._index: dict[int, int] = {}  # of the tokens that are not in the prompt
        self._counted = start

    @property
    def ids(self) -> Ids:
        """[n] the distinct tokens."""
        return self._ids[: self._size]

    @property
    def said(self) -> Counts:
        """[n] how often the answer has each of ``ids``: float32, exact to 2^24."""
        return self._said[: self._size]

    def follow(self, tokens: Sequence[int]) -> None:
        """Count the sequence's new tokens, up to one that is still in flight (a negative id)."""
        for token in tokens[self._counted :]:
            if token < 0:
                return
            index = self._index_of(token)  # may reallocate the arrays
            self._said[index] += 1
            self._counted += 1

    def _index_of(self, token: int) -> int:
        index = int(np.searchsorted(self._prompt, token))
        if index < len(self._prompt) and self._prompt[index] == token:
            return index
        if token not in self._index:
            self._append(token)
        return self._index[token]

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            self._ids, self._said = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._said))
        self._index[token] = self._size
        self._ids[self._size] = token
        self._size += 1
