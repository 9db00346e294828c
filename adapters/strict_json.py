"""A strict and bounded JSON reader for untrusted data: adapters' files and dataset rows.

Python's reader accepts input that is ambiguous or costs more than its size: duplicate keys, NaN, numbers of
any length, any nesting, and lone surrogates. This reader refuses all of these. Its time and memory grow only
with the size of the input. The caller bounds that size before reading.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_DEPTH = 128
"""The deepest nesting of objects and arrays."""

MAX_NUMBER_LENGTH = 64
"""The most characters of a number. Converting an integer takes quadratic time. A double needs 24 characters.
For a tokenizer without a length limit, transformers writes ``int(1e30)``, which has 31 digits."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonInvalid(ValueError):
    """The input is not JSON within these bounds. The message completes "the file …": "is not JSON (…)"."""


def parse_json(data: bytes | bytearray) -> Any:
    """The value in ``data``. A byte order mark is skipped. Raises JsonInvalid."""
    try:
        value = json.loads(
            data.decode("utf-8").removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise JsonInvalid(f"is not UTF-8 (byte {error.start})") from None
    except _LongNumber as error:
        where = _field_of(error.text, data)
        raise JsonInvalid(f"has {error.what}{where}; {error.limit}") from None
    except json.JSONDecodeError as error:
        raise JsonInvalid(f"is not JSON ({error})") from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(data)
    _check_text(value, data)
    return value


def parse_json_object(data: bytes | bytearray) -> dict[str, Any]:
    """Like ``parse_json``, for one object. Raises JsonInvalid."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise JsonInvalid(f"must hold one JSON object, not a {type(value).__name__}")
    return value


class _LongNumber(ValueError):
    def __init__(self, text: str, what: str, limit: str) -> None:
        self.text, self.what, self.limit = text, what, limit


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise JsonInvalid(f"is ambiguous JSON: the key {twice!r:.60} occurs twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise JsonInvalid(f"is not JSON ({text} is not a JSON number)")


def _integer(text: str) -> int:
    _check_length(text, "digits")
    return int(text)


def _float(text: str) -> float:
    _check_length(text, "characters")
    value = float(text)
    if math.isinf(value):
        raise _LongNumber(text, f"the number {text}", "that is more than a double can hold")
    return value


def _check_length(text: str, unit: str) -> None:
    if len(text) > MAX_NUMBER_LENGTH:
        limit = f"at most {MAX_NUMBER_LENGTH} are read"
        raise _LongNumber(text, f"a number of {len(text)} {unit}", limit)


def _field_of(number: str, data: bytes | bytearray) -> str:
    """The place of the number, for the error: the key before it, if it is the key's value."""
    found = re.search(rb'"([^"\\]{1,60})"\s*:\s*' + re.escape(number[:100].encode()), data)
    return f" in {found[1].decode('utf-8', 'replace')!r}" if found else ""


def _check_depth(data: bytes | bytearray) -> None:
    """Removes the innermost brackets, one level at a time. ``data`` is JSON, so they are balanced."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", data).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    raise _too_deep()


def _too_deep() -> JsonInvalid:
    return JsonInvalid(f"is nested too deep; at most {MAX_DEPTH} levels of objects and arrays are read")


def _check_text(value: Any, data: bytes | bytearray) -> None:
    """Refuse lone surrogates, because UTF-8 cannot encode them."""
    if _SURROGATE.search(data) is None:
        return
    for text in _texts(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise JsonInvalid(
                f"has {half} in a string, half of a surrogate pair, which is not valid text"
            ) from None


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()
