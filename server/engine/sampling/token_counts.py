"""What penalties need: the distinct tokens of a sequence, and how often its answer has each. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float32]


class TokenCounts:
    """Kept with a sequence, and brought up to date by one token a step.

    Args:
        prompt: token ids that count as seen, and as said zero times.
        start: how many leading tokens of the sequence come before its answer.
    """

    def __init__(self, prompt: Sequence[int], start: int) -> None:
        self._prompt: Ids = np.unique(np.array(prompt, np.int64))
        self._size = len(self._prompt)
        self._ids: Ids = np.concatenate([self._prompt, np.zeros(64, np.int64)])
        self._said: Counts = np.zeros(len(self._ids), np.float32)
        self._places: dict[int, int] = {}  # of the tokens that the prompt does not have
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
        """Count the sequence's new tokens, up to one that nobody has read yet (a negative id)."""
        for token in tokens[self._counted :]:
            if token < 0:
                return
            place = self._place(token)  # which may move the arrays
            self._said[place] += 1
            self._counted += 1

    def _place(self, token: int) -> int:
        place = int(np.searchsorted(self._prompt, token))
        if place < len(self._prompt) and self._prompt[place] == token:
            return place
        if token not in self._places:
            self._append(token)
        return self._places[token]

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            self._ids, self._said = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._said))
        self._places[token] = self._size
        self._ids[self._size] = token
        self._size += 1
