"""Each log line is one JSON object, for any text in it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.registry import Registry
from server.logs import JsonFormatter, TextFormatter


def record(message: str = "hello", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("manylora.x", logging.INFO, "file", 1, message, (), None)
    made.__dict__["fields"] = fields
    return made


def test_json_is_one_line_with_the_fields_beside() -> None:
    line = JsonFormatter().format(record("two\nlines", model='a"b\n', status=200))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info",
        "logger": "manylora.x",
        "message": "two\nlines",
        "model": 'a"b\n',
        "status": 200,
    }


def test_an_exception_stays_in_its_line() -> None:
    made = record()
    try:
        raise ValueError("bad")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: bad")


def test_text_quotes_what_clients_chose() -> None:
    line = TextFormatter().format(record(model="a\nERROR forged"))
    assert line.endswith('manylora.x: hello model="a\\nERROR forged"')


def test_no_name_forges_a_line_of_text() -> None:
    made = record("Adapter a\n2026-01-01 ERROR forged\x1b[2K is not served")
    try:
        raise ValueError("bad\n2026-01-01 ERROR forged")
    except ValueError:
        made.exc_info = sys.exc_info()
    first, *rest = TextFormatter().format(made).splitlines()
    assert first.endswith("Adapter a\\n2026-01-01 ERROR forged\\x1b[2K is not served")
    assert all(line.startswith("    ") for line in rest)


def test_an_adapters_event_names_its_version_and_tier(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "manylora.adapters")
    content: Any = SimpleNamespace(digest="0123456789abcdef", rank=8, warnings=())
    registry = Registry(Path("/adapters"), lambda _: content)
    registry.tier = {content.digest: "host"}.__getitem__  # type: ignore[assignment]
    version = registry.register("pirate", "pirate", replace=False)
    entry = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert entry["message"] == "adapter served"
    assert {name: entry[name] for name in ("name", "digest", "version", "tier")} == {
        "name": "pirate",
        "digest": "0123456789ab",
        "version": round(version.created, 3),
        "tier": "host",
    }
