"""Read query parameters. A parameter that is not declared is refused by name, as in bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from server.config import values
from server.errors import InvalidRequest

MAX_PARAMETERS = 64


@dataclass(frozen=True, slots=True)
class Parameter:
    """One query parameter.

    Attributes:
        parse: turns the text into the value. Raises ``ValueError("must be …")``.
        default: the value of an absent parameter.
        schema: its JSON Schema, for ``GET /openapi.json``.
    """

    parse: Callable[[str], Any]
    default: Any
    schema: dict[str, Any]


Parameters = Mapping[str, Parameter]

TEXT = Parameter(values.text, None, {"type": "string", "pattern": r"\S"})
ANY = Parameter(str, None, {"type": "string"})
SWITCH = Parameter(values.flag, False, {"type": "boolean", "default": False})


def integer(low: int, high: int, default: int) -> Parameter:
    """A whole number from ``low`` to ``high``."""
    schema = {"type": "integer", "minimum": low, "maximum": high, "default": default}
    return Parameter(values.integer(low, high), default, schema)


def choice(*allowed: str, default: str) -> Parameter:
    """One of the allowed words."""
    return Parameter(values.choice(*allowed), default, {"enum": list(allowed), "default": default})


def read_query(request: Request, declared: Parameters) -> dict[str, Any]:
    """The parsed value of each declared parameter, or its default. Raises InvalidRequest."""
    given = request.query_params
    if len(given) > MAX_PARAMETERS:
        raise InvalidRequest(f"The query has {len(given)} parameters; at most {MAX_PARAMETERS} are allowed.")
    for name in given:
        if name not in declared:
            raise InvalidRequest(f"'{name[:100]}' is not supported; leave it out.", name[:100])
    return {
        name: _parse(name, given[name], each) if name in given else each.default
        for name, each in declared.items()
    }


def _parse(name: str, text: str, parameter: Parameter) -> Any:
    try:
        return parameter.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"'{name}' {error}.", name, "invalid_value") from None
