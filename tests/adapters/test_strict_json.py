"""The strict reader gives the same values as Python's reader, and it refuses bad input quickly."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.strict_json import MAX_DEPTH, JsonInvalid, parse_json, parse_json_object

TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)


@given(VALUES, st.booleans())
def test_all_valid_json_is_read(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff{}", "is not UTF-8 (byte 0)"),
        (b"{", "is not JSON (Expecting property name"),
        (b"", "is not JSON (Expecting value"),
        (b'{"a": [NaN]}', "is not JSON (NaN is not a JSON number"),
        (b"-Infinity", "is not JSON (-Infinity is not a JSON number"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        (b'{"a": 1, "b": ' + b"9" * 65 + b"}", "has a number of 65 digits in 'b'; at most 64 are read"),
        (b"[1, " + b"9" * 4000 + b"]", "has a number of 4000 digits; at most 64 are read"),
        (b'{"a": -1.' + b"0" * 80 + b"}", "has a number of 83 characters in 'a'; at most 64 are read"),
        (b'{"a": 1e400}', "has the number 1e400 in 'a'; that is more than a double can hold"),
        (b'{"\\ud800": 1}', "has \\ud800 in a string"),
        (b'{"a": [{"b": "x\\uDFFF\\ud800"}]}', "has \\udfff in a string"),
    ],
)
def test_what_is_refused_and_why(data: bytes, reason: str) -> None:
    with pytest.raises(JsonInvalid) as refused:
        parse_json(data)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"[": "]\\"]]", "a":', "}]")]
)
def test_nesting_is_bounded(opening: str, closing: str) -> None:
    def nested(times: int) -> bytes:
        return (opening * times + "0" + closing * times).encode()

    most = MAX_DEPTH // len(closing)
    parse_json(nested(most))
    for times in (most + 1, 50_000):
        with pytest.raises(JsonInvalid, match="nested too deep; at most 128 levels"):
            parse_json(nested(times))


def test_a_byte_order_mark_is_accepted() -> None:
    assert parse_json_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_an_object_is_not_a_list() -> None:
    with pytest.raises(JsonInvalid, match="must hold one JSON object, not a list"):
        parse_json_object(b"[1]")


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"1" * 2**21 + b"]",
        b"[" + (b"1" * 1000 + b",") * 2000 + b"1]",
        b"[1." + b"1" * 2**21 + b"]",
        b"[" * 2**21,
        b"[" + b"[]," * 2**19 + b"[]]",
        b'["' + b"\\ud83d\\ude00" * 2**17 + b'"]',
        b"{" + b",".join(b'"%d":0' % number for number in range(2**17)) + b"}",
    ],
    ids=["one integer", "integers", "a fraction", "depth", "arrays", "surrogates", "keys"],
)
def test_the_time_depends_only_on_the_size(data: bytes) -> None:
    begun = time.monotonic()
    with suppress(JsonInvalid):
        parse_json(data)
    assert time.monotonic() - begun < 5
