"""Invented encoded rows."""

from __future__ import annotations

import random

from adapters.training.encode import Example
from tests.support.tiny_models import VOCAB_SIZE


def example(length: int, seed: int) -> Example:
    """Random tokens. The last third is learnt."""
    numbers = random.Random(seed)
    ids = [numbers.randrange(3, VOCAB_SIZE) for _ in range(length)]
    return Example(ids, [place >= length * 2 // 3 for place in range(length)])
