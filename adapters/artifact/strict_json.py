"""JSON as two files of an adapter must be: one object, no key twice, no NaN, no endless nesting."""

from __future__ import annotations

import json
from typing import Any

from adapters.errors import AdapterInvalid


def parse_object(data: bytes | bytearray, name: str) -> dict[str, Any]:
    """The object in ``data``; raises AdapterInvalid naming the file ``name``."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{name} must hold one JSON object, not a {type(value).__name__}.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.100} occurs twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
