"""Finds duplicate rows: within one file, or in both the training and the evaluation data."""

from __future__ import annotations

import hashlib
import json

from adapters.training.dataset import Dataset, Row

_MANY = 0.1
"""Share of duplicate rows in a file from which there is a warning. A few are often intended."""


def repetitions(data: Dataset, held_out: Dataset | None) -> list[str]:
    """Warnings, as sentences with counts."""
    digests = [_digest(row) for row in data.rows]
    known = set(digests)
    found = []
    if (repeated := len(digests) - len(known)) and repeated >= _MANY * len(digests):
        found.append(
            f"{data.path.name}: {repeated} of {len(digests)} rows repeat an earlier row word for word, "
            "so they count several times."
        )
    if held_out is not None and (shared := sum(_digest(row) in known for row in held_out.rows)):
        found.append(
            f"{held_out.path.name}: {shared} of {len(held_out.rows)} rows are also training rows, so the "
            "held-out loss measures memorised rows; validate on other rows."
        )
    return found


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(json.dumps(row.messages).encode(), digest_size=16).digest()
