"""Read query parameters. A parameter that is not declared is refused by name, as in bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from server.errors import InvalidRequest

MAX_PARAMETERS = 64

Parse = Callable[[str], Any]
"""Turns the text into the value. Raises ``ValueError("must be …")``."""


def read_query(request: Request, declared: Mapping[str, tuple[Parse, Any]]) -> dict[str, Any]:
    """The parsed value of each declared parameter, or its default. Raises InvalidRequest."""
    given = request.query_params
    if len(given) > MAX_PARAMETERS:
        raise InvalidRequest(f"The query has {len(given)} parameters; at most {MAX_PARAMETERS} are allowed.")
    for name in given:
        if name not in declared:
            raise InvalidRequest(f"'{name[:100]}' is not supported; leave it out.", name[:100])
    return {
        name: _parse(name, given[name], parse) if name in given else default
        for name, (parse, default) in declared.items()
    }


def _parse(name: str, text: str, parse: Parse) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidRequest(f"'{name}' {error}.", name, "invalid_value") from None
