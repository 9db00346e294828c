"""Sampling defaults from the base's ``generation_config.json``, used as vLLM uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.base import LoadedBase
from server.config import ConfigError
from server.engine.sampling_params import SAMPLING_RANGES, SamplingDefaults

_FILE = "generation_config.json"
_REMEDY = "give --generation-config none, or a folder with another file"


def sampling_defaults(choice: str, base: LoadedBase) -> SamplingDefaults:
    """The sampling defaults for requests that leave fields out.

    Args:
        choice: the value of ``--generation-config``: ``auto`` (the base's), ``none``, or a folder.

    Raises:
        ConfigError: there is no such file, or a value is outside the range allowed to requests.
    """
    if choice == "none":
        return SamplingDefaults()
    found = base.model.generation_config.to_dict() if choice == "auto" else _read(Path(choice))
    given = {name: value for name in SAMPLING_RANGES if (value := found.get(name)) is not None}
    longest = found.get("max_new_tokens")
    if longest is not None:
        given["max_tokens"] = longest
    return SamplingDefaults(**{name: _checked(name, value) for name, value in given.items()})


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--generation-config {folder}: {_FILE} cannot be read there ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--generation-config {folder}: {_FILE} is not a JSON object")
    return found


def _checked(name: str, value: Any) -> Any:
    """The value, converted to the type of its range."""
    low, high = SAMPLING_RANGES.get(name, (1, 1 << 31))
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ConfigError(f"{_FILE}: {name} is {value!r:.40}, which is not a number of its kind; {_REMEDY}")
    if not low <= value <= high:
        raise ConfigError(f"{_FILE}: {name} is {value}, and must be from {low} to {high}; {_REMEDY}")
    return value if whole else float(value)
