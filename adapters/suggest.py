"""Finds the known names that a mistyped name may mean."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

MAX_LENGTH = 512
"""Longer names get no suggestions, because the cost of a comparison grows with the length."""

NEIGHBOURS = 50
"""Known names before and after the name, in alphabetical order, that are compared. Comparing all is slow."""


def near_names(
    name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6, neighbours: int = NEIGHBOURS
) -> list[str]:
    """Up to ``count`` known names, the most similar first.

    Args:
        cutoff: the least similarity, from 0 to 1.
    """
    if len(name) > MAX_LENGTH:
        return []
    names = sorted(known)
    place = bisect(names, name)
    return get_close_matches(name, names[max(0, place - neighbours) : place + neighbours], count, cutoff)


def did_you_mean(near: Sequence[str], otherwise: str = ".") -> str:
    """The end of a sentence: ``; did you mean 'a' or 'b'?``, or ``otherwise`` if there are no names."""
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else otherwise
