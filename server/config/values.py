"""Parsers of option values, one for each kind. Each raises ``ValueError("must be …")``."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def text(value: str) -> str:
    """Any text that is not empty."""
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def json_object(value: str) -> str:
    """A JSON object, as text with sorted keys."""
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ValueError(f'must be a JSON object such as {{"rope_theta": 1000000}} ({error})') from None
    if not isinstance(parsed, dict):
        raise ValueError('must be a JSON object such as {"rope_theta": 1000000}')
    return json.dumps(parsed, sort_keys=True)


def path(value: str) -> Path:
    """A file's path."""
    return Path(text(value))


def name(value: str) -> str:
    """A model's name that can be part of a URL."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:-]*", value):
        raise ValueError("must begin with a letter or digit and hold only letters, digits and . _ / : -")
    return value


def key(value: str) -> str:
    """A bearer key: visible ASCII characters, because it is sent in a header."""
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("must be visible ASCII characters without spaces, at least one")
    return value


def host_pattern(value: str) -> str:
    """A host name or address without a port, a pattern such as ``*.example.com``, or ``*``; in lower case."""
    if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[?[0-9A-Fa-f:.]+\]?", value):
        raise ValueError(
            "must be a host name or address without a port, a pattern such as *.example.com, or *"
        )
    return value.strip("[]").lower()


def keys_in(file: Path) -> tuple[str, ...]:
    """The keys in a file, one on each line. Empty lines and lines that begin with # are skipped."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("must hold keys of visible ASCII characters, one on each line") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                keys.append(key(line.strip()))
            except ValueError as error:
                raise ValueError(f"line {number} {error}") from None
    if not keys:
        raise ValueError("must hold a key; the file has none")
    return tuple(keys)


def gpu(value: str) -> str:
    """``auto``, ``none``, or one GPU as in CUDA_VISIBLE_DEVICES: 1, GPU-…, MIG-…."""
    if not re.fullmatch(r"auto|none|[0-9]{1,4}|(GPU|MIG)-[A-Za-z0-9/-]{4,80}", value):
        raise ValueError("must be auto, none, or a GPU's number or UUID")
    return value


def generation_config(value: str) -> str:
    """``auto``, ``none``, or a folder. ``vllm``, vLLM's word for its own defaults, means ``none``."""
    word = text(value).lower()
    return "none" if word == "vllm" else word if word in ("auto", "none") else value


def choice(*allowed: str) -> Callable[[str], str]:
    """One of the allowed words; the case does not matter."""

    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.lower()

    return parse


def flag(value: str) -> bool:
    """A switch: true, 1, yes, on, false, 0, no or off."""
    words = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }
    if value.lower() not in words:
        raise ValueError("must be true or false")
    return words[value.lower()]


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A whole number from ``low`` to ``high``, both included."""
    bounds = f", at least {low}" if high == math.inf else f" from {low} to {high}"

    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number{bounds}")
        return int(value)

    return parse


def _number(value: str) -> float:
    """The number, or NaN, which is outside every range, if ``value`` is not a number."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def seconds(value: str) -> float:
    """A duration in seconds, 0 or more."""
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError("must be a number of seconds, 0 or more")
    return number


def some_seconds(value: str) -> float:
    """A duration in seconds, at least a hundredth."""
    if (number := seconds(value)) < 0.01:
        raise ValueError("must be a number of seconds, at least 0.01")
    return number


def whole_seconds(value: str) -> int:
    """A duration in whole seconds, at most a day."""
    return integer(1, 86_400)(value)


def share(value: str) -> float:
    """A fraction from 0 to 0.95."""
    number = _number(value)
    if not 0 <= number <= 0.95:
        raise ValueError("must be a number from 0 to 0.95")
    return number


def fraction(value: str) -> float:
    """A fraction above 0, up to 1."""
    number = _number(value)
    if not 0 < number <= 1:
        raise ValueError("must be a number above 0, and at most 1")
    return number


def size(low: int) -> Callable[[str], int]:
    """A number of bytes, plain, with a decimal unit (512MB) or with a binary one (512MiB, 512M, 1.5G)."""

    def parse(value: str) -> int:
        match = re.fullmatch(
            r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(i?B)?", value.strip(), re.IGNORECASE
        )
        if match is None:
            raise ValueError("must be a number of bytes, or one with a unit such as 512MiB, 2GiB or 2G")
        number, prefix, suffix = match.groups()
        units = _UNITS if (suffix or "").lower() == "b" else _BINARY_UNITS
        count = int(float(number) * units[prefix.upper()])
        if count < low:
            raise ValueError(f"must be at least {low} bytes")
        return count

    return parse


def auto_or(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """``auto`` (None), or a value that ``parse`` accepts."""

    def parse_auto(value: str) -> T | None:
        if value.lower() == "auto":
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return parse_auto


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """``parse`` as the ``type`` of an argparse option, whose error then names the value."""

    def parse_argument(value: str) -> T:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{value!r} {error}") from None

    return parse_argument
